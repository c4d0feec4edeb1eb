"""Attaching is reversible, leaves no trace, and refuses what it cannot do."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig

from moa.errors import HubError, ModelError, PlanError, UsageError
from moa.hf import apply, model_shape
from moa.plan import Plan


def test_detaching_leaves_no_trace(model, plan, prompts, make) -> None:
    before, want = make.traces(model), model.generate(prompts, **make.greedy)
    with apply(model, plan) as attachment:
        assert model.moa is attachment
        assert make.traces(model) != before
        model.generate(prompts, **make.greedy)
    assert make.traces(model) == before
    assert torch.equal(model.generate(prompts, **make.greedy), want)
    attachment.detach()
    assert make.traces(model) == before


def test_an_exception_leaves_no_trace(model, plan, make, monkeypatch) -> None:
    before = make.traces(model)
    with pytest.raises(ZeroDivisionError), apply(model, plan):
        1 / 0  # noqa: B018  # any exception
    assert make.traces(model) == before
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "base_model", property(lambda self: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            apply(model, plan)
    assert make.traces(model) == before
    with apply(model, plan), pytest.raises(IndexError):
        model(torch.tensor([[999]]))
    assert make.traces(model) == before


def test_disabled_runs_dense_and_comes_back_also_after_an_exception(model, plan, prompts, make) -> None:
    dense = model.generate(prompts, **make.greedy)
    with apply(model, plan) as attachment:
        sparse = model.generate(prompts, **make.greedy)
        with attachment.disabled():
            assert torch.equal(model.generate(prompts, **make.greedy), dense)
        with pytest.raises(ZeroDivisionError), attachment.disabled():
            1 / 0  # noqa: B018  # any exception
        assert torch.equal(model.generate(prompts, **make.greedy), sparse)


def test_applying_twice_is_refused_and_again_after_detaching_is_not(model, plan) -> None:
    attachment = apply(model, plan)
    with pytest.raises(ModelError, match="already applied"):
        apply(model, plan)
    attachment.detach()
    apply(model, plan).detach()


def test_the_summary_names_backend_and_plan(model, plan) -> None:
    with apply(model, plan, backend="reference") as attachment:
        assert "backend reference: accuracy only: saves no memory" in attachment.summary()
        assert plan.sha256[:12] in attachment.summary()
        assert attachment.backend == "reference"
        assert attachment.plan is plan
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        apply(model, plan, backend="torhc")


def test_a_cache_that_is_dropped_is_freed_at_once(model, plan, prompts) -> None:
    gc.collect()
    gc.disable()
    try:
        with apply(model, plan) as attachment, torch.no_grad():
            cache = attachment.new_cache()
            model(prompts, past_key_values=cache)
            data = weakref.ref(cache.memory.state(0).layers[0].stores[0].data)
            del cache
            assert data() is None
    finally:
        gc.enable()


def test_models_that_cannot_run_under_a_plan_say_why(make) -> None:
    plan = make.plan(make.model())
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="'dynamic' rescales the positions of past keys"):
        apply(make.model(rope_parameters=dynamic), plan)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="AttentionInterface"):
        apply(bloom, plan)
    with pytest.raises(ModelError, match="wanted a transformers model"):
        apply(torch.nn.Linear(2, 2), plan)


def test_a_config_that_is_wrong_about_kv_heads_is_refused(prompts) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = GPTNeoXConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)  # GPT-NeoX ignores the latter
    model = AutoModelForCausalLM.from_config(config).eval()
    plan = Plan.uniform(model_shape(model), 0, 0.5)
    with apply(model, plan), pytest.raises(ModelError, match="layer 0 has 4 KV heads, its config and the plan say 2"):
        model(prompts)


def test_dropout_is_refused(make, prompts) -> None:
    model = make.model(attention_dropout=0.1).train()
    with apply(model, make.plan(model)), pytest.raises(ModelError, match="dropout"):
        model(prompts)


def test_a_plan_for_another_model_is_refused(model, plan, make) -> None:
    with pytest.raises(PlanError, match=r"model\.layers is 2 in the plan, 3 in this model"):
        apply(make.model(num_hidden_layers=3), plan)
    with pytest.raises(PlanError, match="fingerprint"):
        apply(make.model(seed=1), plan)
    apply(make.model(seed=1), plan, allow_other_weights=True).detach()


def test_a_plan_is_taken_from_where_it_lies(model, plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    for place in (tmp_path, str(tmp_path / "plan.json")):
        with apply(model, place) as attached:
            assert attached.plan == plan
    with pytest.raises(PlanError, match="no such file"):
        apply(model, tmp_path / "none.json")
    with pytest.raises(HubError, match=r"org/none: no such file or folder here, .* HF_HUB_OFFLINE is set"):
        apply(model, "org/none")
    assert not hasattr(model, "moa")
