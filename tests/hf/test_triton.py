"""A model under the Triton backend, in Triton's interpreter: the same tokens as under the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moa.errors import UsageError
from moa.hf import apply

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


@pytest.fixture(scope="module")
def small(make: SimpleNamespace) -> SimpleNamespace:
    """A model that is cheap to interpret: two layers with a KV head each, and spans that drop keys from 16 tokens on."""
    model = make.model(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    return SimpleNamespace(model=model, plan=make.plan(model, (((0, 0.5),), ((0, 0.0),))))


def test_generates_what_the_reference_generates(make: SimpleNamespace, small: SimpleNamespace) -> None:
    """A padded batch; keys are dropped in the prompt and while tokens are generated."""
    prompts = torch.randint(3, 128, (2, 67), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 67, dtype=torch.long)
    mask[1, :50] = 0
    options = {**make.greedy, "attention_mask": mask, "max_new_tokens": 3}
    with apply(small.model, small.plan, backend="reference"):
        want = small.model.generate(prompts, **options)
    with apply(small.model, small.plan, backend="triton") as attached:
        got = small.model.generate(prompts, **options)
        assert attached.backend == "triton"
        assert "pages of 64 tokens" in attached.summary()
        # Of 2 heads: 69 tokens of the first row take the sinks' page and the next, 19 of the other one page.
        assert attached.kv_bytes == (2 * 2 + 2) * 2 * 64 * 16 * 4
        assert attached.dense_kv_bytes == 2 * 69 * 2 * 2 * 16 * 4
        assert "KV: 48.00 KiB for 2 x 69 tokens, dense 34.50 KiB (139 %)" in attached.summary()
        assert "at 4,096 tokens: spans 16 to 2,048, density 0.252" in attached.summary()
    assert torch.equal(got, want)


def test_beams_are_copied(make: SimpleNamespace, small: SimpleNamespace) -> None:
    prompts = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(2))
    options = {**make.greedy, "max_new_tokens": 3, "num_beams": 2}
    runs = []
    for backend in ("reference", "triton"):
        with apply(small.model, small.plan, backend=backend):
            runs.append(small.model.generate(prompts, **options))
    assert torch.equal(*runs)


def test_keys_and_values_may_be_quantised(small: SimpleNamespace) -> None:
    """The first page holds the sinks and is not; 66 tokens then take a page of codes with their scales as well."""
    with apply(small.model, small.plan, backend="triton", kv_dtype="int8") as attached, torch.no_grad():
        small.model(torch.randint(3, 128, (1, 66), generator=torch.Generator().manual_seed(3)), use_cache=True)
        assert attached.kv_bytes == 2 * (2 * 64 * 16 * 4 + 2 * 64 * (16 + 4))
        assert "KV beyond the sinks in int8" in attached.summary()
    with pytest.raises(UsageError, match="backend 'torch' has no option 'kv_dtype', it has none"):
        apply(small.model, small.plan, kv_dtype="int8")
    assert not hasattr(small.model, "moa")


def test_a_backward_pass_says_that_there_is_no_gradient(small: SimpleNamespace) -> None:
    with apply(small.model, small.plan, backend="triton"):
        logits = small.model(torch.tensor([[5, 6, 7]]), use_cache=False).logits
        with pytest.raises(UsageError, match="has no gradient; use backend 'torch'"):
            logits.sum().backward()
