"""What a plan cannot do, or cannot be meant, is one error that says so; what merely looks odd works."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from threading import Thread

import pytest
import torch
from transformers import PreTrainedModel

from moa.errors import MoaError, ModelError, PlanError, UsageError
from moa.hf import apply
from moa.plan import Plan


@pytest.mark.parametrize("wrong", [None, 3, {}, b"plan.json", [0.5]], ids=repr)
def test_what_is_no_plan_is_refused(model, wrong: object) -> None:
    with pytest.raises(UsageError, match=f"wanted a plan, or the file, .* got {type(wrong).__name__}"):
        apply(model, wrong)
    assert not hasattr(model, "moa")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backend": None}, "there is no attention backend None"),
        ({"prefill_chunk": "64"}, "prefill_chunk must be at least 1 token, a whole number, got '64'"),
        ({"prefill_chunk": 1.5}, "got 1.5"),
        ({"prefill_chunk": True}, "got True"),
        ({"prefill_chunk": -1}, "got -1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(model, plan, make, options, match: str) -> None:
    before = make.traces(model)
    with pytest.raises(UsageError, match=match):
        apply(model, plan, **options)
    assert make.traces(model) == before


def test_only_a_causal_model_takes_a_plan(model, plan) -> None:
    for wrong in (None, "demo", 3):
        with pytest.raises(ModelError, match=f"got {type(wrong).__name__}; load one with AutoModelForCausalLM"):
            apply(wrong, plan)
    with pytest.raises(PlanError, match="'LlamaModel' in this model"):
        apply(model.model, plan)


@pytest.mark.parametrize("copied", [deepcopy, pickle.dumps])
def test_a_model_under_a_plan_is_not_copied(model, plan, prompts, make, copied: Callable[..., object]) -> None:
    """A copy would have the hooks of a plan that is bound to the original; copied before or after, each has its own."""
    with apply(model, plan):
        with pytest.raises(ModelError, match=r"cannot be copied or pickled .* call model\.moa\.detach\(\) first"):
            copied(model)
        want = model.generate(prompts, **make.greedy)
    twin = deepcopy(model)
    with apply(twin, plan), apply(model, plan):
        assert torch.equal(twin.generate(prompts, **make.greedy), want)
        assert torch.equal(model.generate(prompts, **make.greedy), want)


CACHES = ("static", "offloaded", "offloaded_static", "quantized", "dynamic")


@pytest.mark.parametrize("implementation", CACHES)
def test_caches_that_keep_every_token_are_refused(model, plan, prompts, make, implementation: str) -> None:
    with apply(model, plan), pytest.raises(ModelError, match=f"cache_implementation='{implementation}' keeps every"):
        model.generate(prompts, cache_implementation=implementation, **make.greedy)


def test_attention_weights_are_refused(model, plan, prompts, make) -> None:
    """Stock sdpa gives an empty tuple in silence."""
    with apply(model, plan):
        for ask in (model, lambda ids, **o: model.generate(ids, **make.greedy, **o, return_dict_in_generate=True)):
            with pytest.raises(ModelError, match="no attention weights are made under a plan"):
                ask(prompts, output_attentions=True)
        with model.moa.disabled():
            model.set_attn_implementation("eager")
            assert model(prompts, output_attentions=True).attentions[0].shape == (2, 8, 150, 150)
        assert len(model(prompts, output_hidden_states=True).hidden_states) == 3


def test_another_attention_set_meanwhile_is_refused_and_detaching_undoes_it(model, plan, prompts, make) -> None:
    before = make.traces(model)
    with apply(model, plan):
        model.set_attn_implementation("eager")
        with pytest.raises(ModelError, match="set to 'eager' after the plan was applied"):
            model(prompts)
    assert make.traces(model) == before


@pytest.mark.parametrize("shape", [(150,), (2, 100), (2, 160), (1, 150), (2, 1, 150)], ids=str)
def test_masks_of_another_shape_are_refused(model, plan, prompts, shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.long)
    mask[..., 0] = 0
    with apply(model, plan), pytest.raises(ModelError, match=r"attention_mask has shape|wanted a padding mask"):
        model(prompts, attention_mask=mask)


def test_the_mask_of_a_later_step_covers_what_was_seen(model, plan, prompts) -> None:
    with apply(model, plan) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompts, past_key_values=cache)
        with pytest.raises(
            ModelError, match=r"has seen 150 tokens and gets 5; wanted one column per token, \[B, 155\]"
        ):
            model(prompts[:, :5], attention_mask=torch.ones(2, 5), past_key_values=cache)


def test_a_pinned_cache_of_no_tokens_is_refused(model, make) -> None:
    plan, refused = make.plan(model, length_mode="pinned"), "pinned_tokens must be at least 1, got 0"
    with apply(model, plan) as attached, pytest.raises(UsageError, match=refused):
        attached.new_cache(0)


def test_what_transformers_refuses_it_refuses_under_a_plan_too(model, plan, prompts, make) -> None:
    """Its ways of decoding that are code on the hub, nothing to write, and empty prompts: one error each, the same one."""
    ways = (
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"dola_layers": "low"},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"max_new_tokens": 0},
    )
    for options in ways:
        said = []
        for under in (False, True):
            attached = apply(model, plan) if under else None
            with pytest.raises(ValueError, match=r"trust_remote_code|must be greater than 0") as caught:
                model.generate(prompts, **{**make.greedy, **options})
            said.append(str(caught.value))
            if attached:
                attached.detach()
        assert said[0] == said[1]


@pytest.mark.parametrize("ids", [torch.zeros(0, 9, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)], ids=str)
def test_a_batch_without_tokens_does_what_it_does_without_a_plan(model, plan, prompts, make, ids) -> None:
    outcomes = []
    for under in (False, True):
        attached = apply(model, plan) if under else None
        try:
            outcomes.append(model(ids).logits.shape)
        except (RuntimeError, MoaError) as error:
            outcomes.append(str(error))
        if attached:
            assert model.generate(prompts, **make.greedy).shape == (2, 190)
            attached.detach()
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_cast_under_its_plan_goes_on(model, plan, prompts, make, dtype: torch.dtype) -> None:
    with apply(model, plan) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompts, past_key_values=cache)
        model.to(dtype)
        with pytest.raises(ValueError, match=r"torch\.float32 on cpu, as layer 0 holds already"):
            model(prompts[:, :1], past_key_values=cache)
        got = model.generate(prompts, **make.greedy)
        assert attached.dense_kv_bytes == 2 * 189 * 2 * 2 * 4 * 16 * dtype.itemsize
    with apply(model, plan, backend="reference", allow_other_weights=True):
        if dtype == torch.float64:
            assert torch.equal(model.generate(prompts, **make.greedy), got)


def test_threads_with_caches_of_their_own_do_not_meet(model, plan, prompts, make) -> None:
    with apply(model, plan):
        want = [model.generate(prompts[:, : 100 + i], **make.greedy) for i in range(8)]
        got: dict[int, torch.Tensor] = {}

        def generate(i: int) -> None:
            got[i] = model.generate(prompts[:, : 100 + i], **make.greedy)

        threads = [Thread(target=generate, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(8))


def test_two_models_under_two_plans_do_not_meet(model, plan, prompts, make) -> None:
    other = make.model(seed=1)
    dense = Plan.model_validate({**make.plan(other).model_dump(exclude={"sha256"}), "rules": (((0, 1.0),) * 4,) * 2})

    def both(first: PreTrainedModel, second: PreTrainedModel) -> list[torch.Tensor]:
        return [each.generate(prompts, **make.greedy) for each in (first, second)]

    with apply(model, plan):
        want = [both(model, other)[0], both(model, other)[1]]
        with apply(other, dense):
            assert all(map(torch.equal, both(model, other), want))
        with pytest.raises(PlanError, match="fingerprint"):
            apply(other, plan)
        assert all(map(torch.equal, both(model, other), want))


def test_a_generate_in_train_mode_and_of_other_integers(model, plan, prompts, make) -> None:
    with apply(model, plan):
        want = model.generate(prompts, **make.greedy)
        assert torch.equal(model.train().generate(prompts.int(), **make.greedy), want)


def test_detaching_while_disabled_leaves_no_trace(model, plan, prompts, make) -> None:
    before, dense = make.traces(model), model.generate(prompts, **make.greedy)
    attached = apply(model, plan)
    with attached.disabled():
        attached.detach()
        assert make.traces(model) == before
    assert make.traces(model) == before
    assert torch.equal(model.generate(prompts, **make.greedy), dense)
    with attached.disabled():
        assert make.traces(model) == before


def test_several_may_disable_a_plan_at_a_time(model, plan, prompts, make) -> None:
    dense = model.generate(prompts, **make.greedy)
    with apply(model, plan) as attached:
        sparse = model.generate(prompts, **make.greedy)
        first, second = attached.disabled(), attached.disabled()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(model.generate(prompts, **make.greedy), dense)
        second.__exit__(None, None, None)
        assert torch.equal(model.generate(prompts, **make.greedy), sparse)


def test_layers_that_two_models_share_have_one_plan(model, plan, prompts, make) -> None:
    other = make.model()
    other.model, other.lm_head = model.model, model.lm_head
    with apply(model, plan):
        want = model.generate(prompts, **make.greedy)
        with pytest.raises(ModelError, match="already applied to another model that has the same layers"):
            apply(other, plan)
        assert torch.equal(model.generate(prompts, **make.greedy), want)


def test_autocast_gives_one_dtype_as_it_does_to_torchs_attention(model, plan, prompts, make) -> None:
    """In generate and in training; a dense plan stays as near to the model itself as bfloat16 is."""
    logits, losses = [], []
    for each, backend in (
        (plan, "torch"),
        (plan, "reference"),
        (make.plan(model, (((0, 1.0),) * 4,) * 2), "torch"),
        (None, ""),
    ):
        attached = apply(model, each, backend=backend) if each else None
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(prompts, labels=prompts, use_cache=False).loss
            with torch.no_grad():
                logits.append(model(prompts).logits.float())
            assert model.generate(prompts, **make.greedy).shape == (2, 190)
        loss.backward()
        losses.append(loss.item())
        if attached:
            assert attached.kv_bytes or backend == "reference"
            attached.detach()
    spread = logits[3].std()
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * spread
    assert (logits[2] - logits[3]).abs().mean() < 0.05 * spread
    assert (logits[0] - logits[3]).abs().mean() > 0.1 * spread
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[2] == pytest.approx(losses[3], rel=0.01)
