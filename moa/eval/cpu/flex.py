"""Compiled flex_attention under exactly a plan's mask, its blocks computed from window starts without an N x N mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moa.spans import SpanRules

BLOCK = 128


def compiled_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: SpanRules) -> Callable[[], torch.Tensor]:
    """A call with q, k and v [H, N, D], one query head per KV head; compiled when it first runs, which needs a C++ compiler."""
    mask = block_mask(rules, k.shape[1])
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q[None], k[None], v[None], block_mask=mask)


def block_mask(rules: SpanRules, tokens: int) -> BlockMask:
    """The plan's mask for a text of `tokens`, a multiple of the block."""
    starts = torch.from_numpy(rules.window_start(np.arange(tokens))[0])  # [HKV, N]
    low = torch.arange(0, tokens, BLOCK)  # first token of each block
    high, sink = low + BLOCK - 1, rules.sink_tokens
    q_low, q_high, k_low, k_high = low[:, None], high[:, None], low, high
    first, last = starts[:, low, None], starts[:, high, None]  # windows of a block's first and last query, [HKV, B, 1]
    touched = (k_low <= q_high) & ((k_high >= first) | (k_low < sink))  # [HKV, B, B]
    full = (k_high <= q_low) & ((k_low >= last) | (k_high < sink))

    def keeps(b: torch.Tensor, h: torch.Tensor, p: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= p) & ((j >= starts[h, p]) | (j < sink))

    lists = (*_listed(touched & ~full), *_listed(full))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=keeps, seq_lengths=(tokens, tokens))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each row [HKV, B, B] has, and which: int32 [1, HKV, B] and [1, HKV, B, B]."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32)[None], order.to(torch.int32)[None]
