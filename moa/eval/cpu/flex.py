"""Compiled flex_attention under exactly a plan's mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import flex_attention

from moa.eval.flex_mask import chunk_mask
from moa.spans import SpanRules


def compiled_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: SpanRules) -> Callable[[], torch.Tensor]:
    """A call with q, k and v [H, N, D], one query head per KV head; compiled when it first runs, which needs a C++ compiler."""
    mask = chunk_mask(rules.window_start(np.arange(k.shape[1]))[0], 0, rules.sink_tokens)
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q[None], k[None], v[None], block_mask=mask)
