"""A tiny random GQA model in float64, and attention by definition to hold the profiler against."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from moa.profile.data import TextSample

VOCAB = 97


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """Two layers, 4 query and 2 KV heads."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.3, "pad_token_id": 0, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def make_sample(n_tokens: int, answers: int = 3, seed: int = 0) -> TextSample:
    """Random tokens whose last ones are the answers."""
    ids = torch.randint(3, VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    positions = tuple(range(n_tokens - answers, n_tokens))
    return TextSample(tuple(ids), positions, tuple(ids[p] for p in positions))


def captured(model: PreTrainedModel, run: Callable[[], Tensor], shift: Tensor | None = None) -> list[tuple]:
    """(P, dLoss/dP) of every layer, each [B, HQ, N, N], by autograd through plain attention."""
    rows: list[Tensor] = []

    def plain(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **options: object) -> tuple:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        n = q.shape[2]
        scores = q @ k.mT * q.shape[-1] ** -0.5  # [B, HQ, N, N]
        if shift is not None:
            scores = scores + (shift[len(rows)] if shift.ndim == 5 else shift)  # one per layer, or one for all
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        p = scores.softmax(-1)
        p.retain_grad()
        rows.append(p)
        return (p @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_plain", plain)
    AttentionMaskInterface.register("test_plain", flash_attention_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("test_plain")
    try:
        run().backward()
    finally:
        model.set_attn_implementation(before)
        model.zero_grad(set_to_none=True)
    return [(p.detach(), p.grad) for p in rows]


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Makers of models and samples, and the capture of attention rows with their gradients."""
    return SimpleNamespace(model=make_model, sample=make_sample, captured=captured)
