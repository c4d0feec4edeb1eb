"""A plan as a press hides from answers what its spans drop, exactly."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import DynamicCache

from moa.errors import PlanError, UsageError
from moa.eval.compressed import Answering
from moa.hf.shape import model_shape
from moa.integrations.presses import INSTALL, PressedModel, load_kvpress
from moa.plan import Plan

# not importorskip: importing kvpress wraps attention functions for every test of the process
pytestmark = pytest.mark.skipif(find_spec("kvpress") is None, reason=f"kvpress is not installed; {INSTALL}")

PROMPT = 150
RULES = (((0, 0.5), (20, 0.0)), ((0, 0.0), (0, 1.0)), ((60, 0.0), (3, 0.25)))


@pytest.fixture
def plan(model):
    return Plan(model=model_shape(model), rules=RULES, sink_tokens=4, min_span_tokens=16)


@pytest.fixture
def press_of():
    """The class, imported as the adapter does: attention functions are not wrapped for good."""
    load_kvpress()
    from moa.integrations.kvpress import MoAPress

    return MoAPress


def kept_by(plan, n):
    starts = torch.as_tensor(plan.span_rules.window_start(n - 1, n))[..., None]  # [L, HKV, 1]
    keys = torch.arange(n)
    return (keys < plan.sink_tokens) | (keys >= starts)  # [L, HKV, n]


@pytest.mark.parametrize("mode", ["running", "pinned"])
def test_it_is_exactly_a_masked_model(model, ids, masked, plan, press_of, mode):
    plan = plan.model_validate({**{f: getattr(plan, f) for f in ("model", "rules")}, "length_mode": mode,
                                "sink_tokens": 4, "min_span_tokens": 16})  # fmt: skip
    press, n = press_of(plan), PROMPT - 1
    kept = kept_by(plan, n)
    with PressedModel(model, press) as pressed:
        found = []
        prompt, answer = ids[0, :PROMPT].tolist(), ids[0, PROMPT:].tolist()
        answering = Answering(model, lambda x: found.append(pressed.prefill(x)) or found[0], prompt)
        logits = answering.logits(answer)
    assert (found[0].held, found[0].hidden) == (int(kept.sum()), True)
    assert int(kept.sum()) == int(plan.span_rules.span(n).sum())
    assert torch.allclose(logits, masked(ids, kept, n)[PROMPT - 1 : -1], atol=2e-4)
    assert press.compression_ratio == pytest.approx(1 - plan.span_rules.density_ratio(n))


def test_it_needs_no_adapter_where_kvpress_wraps_attention(model, ids, masked, plan, press_of):
    """As a user of kvpress has it, who imported kvpress alone."""
    from kvpress.attention_patch import attention_patch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, n = ALL_ATTENTION_FUNCTIONS["sdpa"], PROMPT - 1
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention_patch(before)
    try:
        cache = DynamicCache()
        with torch.no_grad():
            with press_of(plan)(model):
                model.model(ids[:, :n], past_key_values=cache)
            logits = [
                model(ids[:, p : p + 1], past_key_values=cache, position_ids=torch.tensor([[p]])).logits[0, -1]
                for p in range(n, ids.shape[1] - 1)
            ]
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
    assert torch.allclose(torch.stack(logits), masked(ids, kept_by(plan, n), n)[n:-1], atol=2e-4)


def test_the_ratio_is_the_plans(model, plan, press_of, tmp_path):
    with pytest.raises(UsageError, match="names no length"):
        _ = press_of(plan).compression_ratio
    fields = {name: getattr(plan, name) for name in ("model", "rules", "sink_tokens", "min_span_tokens")}
    told = Plan.model_validate({**fields, "lengths": (plan.at_length(100), plan.at_length(400))})
    told.save(tmp_path / "plan.json")
    press = press_of(str(tmp_path))
    assert press.compression_ratio == 1 - plan.span_rules.density_ratio(400)
    with pytest.raises(AttributeError, match="the plan decides it"):
        press.compression_ratio = 0.5


def test_it_refuses_other_models_and_eager_attention(model, ids, plan, press_of):
    with torch.no_grad():
        model.lm_head.weight[:] += 1
    with pytest.raises(PlanError, match="other weights"):
        PressedModel(model, press_of(plan))
    with (
        PressedModel(model, press_of(plan, allow_other_weights=True), eager=True) as pressed,
        pytest.raises(UsageError, match="eager"),
    ):
        pressed.prefill(ids)
