"""generate() and forward() under a plan equal the dense-mask oracle, in any batch and chunking."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, PreTrainedModel

from moa.errors import ModelError, UsageError
from moa.hf import apply
from moa.plan import Plan


@pytest.fixture
def expected(model: PreTrainedModel, plan: Plan, prompts: torch.Tensor, make: SimpleNamespace) -> torch.Tensor:
    """What the oracle generates; checked to differ from the dense model."""
    with apply(model, plan, backend="reference"):
        tokens = model.generate(prompts, **make.greedy)
    assert not torch.equal(tokens, model.generate(prompts, **make.greedy))
    return tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 64}, {"prefill_chunk_size": 33}, {"prefill_chunk_size": 1}, {"use_cache": False}],
    ids=str,
)
def test_greedy_equals_the_oracle(model, plan, prompts, expected, options, make) -> None:
    with apply(model, plan):
        assert torch.equal(model.generate(prompts, **make.greedy, **options), expected)


@pytest.mark.parametrize("own", [None, 50])
def test_prompts_come_in_the_chunks_that_were_asked_for(model, plan, prompts, expected, own, make) -> None:
    seen: list[int] = []
    config = model.generation_config.to_dict()
    with (
        apply(model, plan, prefill_chunk=64),
        model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        ),
    ):
        options = make.greedy if own is None else {**make.greedy, "prefill_chunk_size": own}
        assert torch.equal(model.generate(prompts, **options), expected)
    assert seen[:3] == ([64, 64, 22] if own is None else [50, 50, 50])
    assert model.generation_config.to_dict() == config
    with pytest.raises(UsageError, match="prefill_chunk must be at least 1"):
        apply(model, plan, prefill_chunk=0)


@pytest.mark.parametrize("length", [1, 2, 15, 17])
def test_generating_across_the_first_drop_equals_the_oracle(model, plan, prompts, length, make) -> None:
    tokens = []
    for backend in ("reference", "torch"):
        with apply(model, plan, backend=backend):
            out = model.generate(prompts[:, :length], **make.greedy, return_dict_in_generate=True, output_logits=True)
        tokens.append(out)
    assert torch.equal(tokens[0].sequences, tokens[1].sequences)
    torch.testing.assert_close(torch.stack(tokens[1].logits), torch.stack(tokens[0].logits), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 33}], ids=str)
@pytest.mark.parametrize("mode", ["running", "pinned"])
def test_left_padded_rows_equal_their_own_runs(model, prompts, options, mode, make) -> None:
    plan = make.plan(model, length_mode=mode)
    mask = torch.ones_like(prompts)
    mask[0, :70] = 0
    with apply(model, plan):
        both = model.generate(prompts.masked_fill(mask == 0, 0), attention_mask=mask, **make.greedy, **options)
        assert torch.equal(both[0, 70:], model.generate(prompts[:1, 70:], **make.greedy)[0])
        assert torch.equal(both[1], model.generate(prompts[1:], **make.greedy)[0])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", [slice(0, 40), slice(110, 150), slice(30, 45)], ids=["left", "right", "inside"])
def test_padding_is_invisible_and_never_nan(model, plan, prompts, pad, use_cache) -> None:
    mask = torch.ones_like(prompts)
    mask[0, pad] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with apply(model, plan), torch.no_grad():
        logits = model(prompts, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
        alone = model(prompts[:1, mask[0].bool()], use_cache=use_cache).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, mask[0].bool()], alone[0], atol=1e-3, rtol=1e-4)


def test_a_row_of_padding_alone_is_finite(model, plan, prompts) -> None:
    mask = torch.ones_like(prompts)
    mask[1] = 0
    with apply(model, plan), torch.no_grad():
        assert model(prompts, attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("mode", ["running", "pinned"])
def test_beams_equal_the_oracle(model, prompts, mode, make) -> None:
    plan, mask = make.plan(model, length_mode=mode), torch.ones_like(prompts)
    mask[1, :33] = 0
    options = {**make.greedy, "num_beams": 3, "max_new_tokens": 15, "attention_mask": mask}
    outs = []
    for backend in ("reference", "torch"):
        with apply(model, plan, backend=backend):
            outs.append(model.generate(prompts, **options))
    assert torch.equal(*outs)


def test_sampling_draws_the_oracles_tokens(model, plan, prompts, make) -> None:
    outs = []
    for backend in ("reference", "torch"):
        torch.manual_seed(7)
        with apply(model, plan, backend=backend):
            outs.append(model.generate(prompts, **{**make.greedy, "do_sample": True, "num_return_sequences": 2}))
    assert torch.equal(*outs)


def test_several_turns_equal_one_prompt(model, plan, prompts, make) -> None:
    with apply(model, plan) as attachment:
        cache = attachment.new_cache()
        first = model.generate(prompts, past_key_values=cache, **make.greedy)
        longer = torch.cat([first, prompts[:, :9]], 1)
        options = {**make.greedy, "attention_mask": torch.ones_like(longer)}
        again = model.generate(longer, past_key_values=cache, **options)
        assert torch.equal(again, model.generate(longer, **options))


def test_a_dense_plan_is_the_untouched_model(model, prompts, make) -> None:
    mask = torch.ones_like(prompts)
    mask[0, :70] = 0
    want = model.generate(prompts, attention_mask=mask, **make.greedy)
    with apply(model, make.plan(model, (((0, 1.0),) * 4,) * 2)):
        assert torch.equal(model.generate(prompts, attention_mask=mask, **make.greedy), want)


def test_bytes_and_tokens_are_those_of_the_plan(model, prompts, make) -> None:
    plan = make.plan(model, (((0, 0.25), (0, 0.5), (0, 0.0), (100, 0.1)),) * 2, sink_tokens=64, min_span_tokens=128)
    ids = prompts.reshape(1, -1).repeat(1, 2)  # [1, 600]
    with apply(model, plan) as attachment:
        out = model.generate(ids, return_dict_in_generate=True, **make.greedy)
        seen = ids.shape[1] + 39
        assert out.past_key_values.get_seq_length() == seen
        assert out.past_key_values.memory.stored_tokens(0, 1) == plan.span_rules.span(seen)[1].tolist()
        assert attachment.kv_bytes == out.past_key_values.kv_bytes == pytest.approx(plan.kv_bytes(seen), rel=0.02)
        del out
        assert attachment.kv_bytes == pytest.approx(plan.kv_bytes(seen), rel=0.02), "readable after the cache is gone"


def test_a_layers_own_sliding_window_composes(prompts, make) -> None:
    """Under a plan that is dense, only the model's own window of 30 remains: the untouched model."""
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, sliding_window=30,
                           initializer_range=0.2, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    want = model.generate(prompts, **make.greedy)
    with apply(model, make.plan(model, (((0, 1.0),) * 4,) * 2)) as attachment:
        assert torch.equal(model.generate(prompts, **make.greedy), want)
        assert attachment.kv_bytes < 2 * 2 * 4 * 2 * 16 * 4 * 60, "the window drops keys"


def test_a_cache_filled_in_inference_mode_goes_on_outside(model, plan, prompts) -> None:
    with apply(model, plan) as attachment, torch.no_grad():
        want = model(prompts).logits
        cache = attachment.new_cache()
        with torch.inference_mode():
            model(prompts[:, :100], past_key_values=cache)
        steps = [model(prompts[:, i : i + 1], past_key_values=cache).logits for i in range(100, 150)]
    torch.testing.assert_close(torch.cat(steps, 1), want[:, 100:], atol=1e-3, rtol=1e-4)


def test_stock_caches_crops_and_odd_masks_are_refused(model, plan, prompts, make) -> None:
    with apply(model, plan) as attachment:
        with pytest.raises(ModelError, match="DynamicCache"):
            model(prompts, past_key_values=DynamicCache())
        with pytest.raises(ModelError, match="DynamicCache"):
            model.generate(prompts, past_key_values=DynamicCache(), **make.greedy)
        with pytest.raises(ModelError, match="cache_implementation='static'"):
            model.generate(prompts, cache_implementation="static", **make.greedy)
        with pytest.raises(ModelError, match="4-D attention mask"):
            model(prompts, attention_mask=torch.ones(2, 1, 150, 150, dtype=torch.bool))
        with pytest.raises(ModelError, match="several sequences packed"):
            model(prompts[:1], position_ids=(torch.arange(150) % 50)[None], use_cache=False)
        with pytest.raises(ModelError, match="dense model"):
            model.generate(prompts[:1], prompt_lookup_num_tokens=3, **make.greedy)
        cache = attachment.new_cache()
        model(prompts, past_key_values=cache)
        with pytest.raises(ModelError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(ModelError, match="holds 2 rows, this step has 1"):
            model(prompts[:1], past_key_values=cache)
        with attachment.disabled(), pytest.raises(ModelError, match="not applied now"):
            model(prompts, past_key_values=cache)
    with apply(model, plan), pytest.raises(ModelError, match="another attachment"):
        model(prompts, past_key_values=cache)
