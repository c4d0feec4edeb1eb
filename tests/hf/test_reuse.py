"""Caches that are copied, interrupted, or used in one grad mode after another."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import moa.kernels.storage
from moa.errors import ModelError
from moa.hf import apply


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("paged", [False, True])
def test_a_copied_cache_goes_on_as_the_original_would(
    model, plan, prompts, make, monkeypatch: pytest.MonkeyPatch, backend: str, paged: bool
) -> None:
    """The recipe for a prefix that many prompts share; the original keeps standing behind the prefix."""
    monkeypatch.setattr(moa.kernels.storage, "LEAST_PAGES", 0 if paged else 1 << 40)
    prefix, tails = prompts[:1, :100], prompts[1, :60].split(20)
    with apply(model, plan, backend=backend) as attachment:
        texts = [torch.cat([prefix, tail[None]], 1) for tail in tails]
        want = [model.generate(text, **make.greedy) for text in texts]
        cache = attachment.new_cache()
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        held = cache.kv_bytes
        for text, tokens in zip(texts, want, strict=True):
            copied = deepcopy(cache)
            assert copied.kv_bytes == held
            assert torch.equal(model.generate(text, past_key_values=copied, **make.greedy), tokens)
            copied.reset()
            assert (copied.kv_bytes, cache.kv_bytes) == (0, held)
        assert torch.equal(model.generate(texts[0], past_key_values=cache, **make.greedy), want[0])


def test_a_copied_cache_goes_off_with_its_plan(model, plan, prompts) -> None:
    with apply(model, plan) as attachment:
        copied = deepcopy(attachment.new_cache())
        with attachment.disabled(), pytest.raises(ModelError, match="not applied now"):
            model(prompts, past_key_values=copied)


@pytest.mark.parametrize("seen", [0, 60])
def test_a_cache_whose_step_was_interrupted_between_layers_is_refused(model, plan, prompts, seen: int) -> None:
    with apply(model, plan) as attachment, torch.no_grad():
        cache = attachment.new_cache()
        if seen:
            model(prompts[:, :seen], past_key_values=cache)

        def interrupt(*call: object) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompts[:, seen : seen + 10], past_key_values=cache)
        hook.remove()
        with pytest.raises(ModelError, match=f"layer 1 has seen {seen} .* before it {seen + 10}: .*; start again with"):
            model(prompts[:, seen : seen + 10], past_key_values=cache)


def test_training_goes_on_after_inference_mode(model, plan, prompts) -> None:
    with apply(model, plan):
        with torch.inference_mode():
            model(prompts)
        model(prompts, labels=prompts, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
