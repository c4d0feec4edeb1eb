"""Block masks of flex_attention under exactly a plan's mask, from the window starts at block edges, without an N x N mask.

Window starts never move back, so a block's first query sees furthest. Equal to `create_block_mask` of the same mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention.flex_attention import BlockMask

from moa.spans import Int64Array

BLOCK = 128
BoolArray = npt.NDArray[np.bool_]
# Whether a query sees a key, by batch row, head, query and key.
Keep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def chunk_mask(
    starts: Int64Array, cached_tokens: int, sink_tokens: int, group: int = 1, device: torch.device | str = "cpu"
) -> BlockMask:
    """Of a chunk of queries behind cached tokens, over all keys up to its end.

    Args:
        starts: `lo(p)` of each KV head and query, int64 [HKV, T].
        cached_tokens: before the chunk.
        sink_tokens: first tokens that every query sees.
        group: query heads of a KV head.
        device: where the mask is used.
    """
    lows = torch.from_numpy(np.ascontiguousarray(starts)).to(device, torch.int32)  # [HKV, T]

    def keep(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= q + cached_tokens) & ((j < sink_tokens) | (j >= lows[h // group, q]))

    partly, fully = _blocks(starts, cached_tokens, sink_tokens)  # [HKV, QB, KB]
    sizes = starts.shape[1], cached_tokens + starts.shape[1]
    return _mask(partly.repeat(group, 0), fully.repeat(group, 0), keep, sizes, device)


def token_mask(
    starts: Int64Array, tokens: int, sink_tokens: int, group: int, device: torch.device | str = "cpu"
) -> BlockMask:
    """Of the last of `tokens` alone, a KV head's `group` query heads as rows; `starts` its `lo(p)` per KV head, [HKV]."""
    lows = torch.from_numpy(np.ascontiguousarray(starts)).to(device, torch.int32)  # [HKV]

    def keep(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j < sink_tokens) | (j >= lows[h])

    partly, fully = _blocks(starts[:, None], tokens - 1, sink_tokens)  # [HKV, 1, KB]
    return _mask(partly, fully, keep, (group, tokens), device)


def _blocks(starts: Int64Array, cached: int, sink_tokens: int) -> tuple[BoolArray, BoolArray]:
    """Blocks of keys that queries of each block see in part, and in full: [HKV, QB, KB] each."""
    first, last = _edges(starts.shape[1])
    k_low, k_high = _edges(cached + starts.shape[1])
    p_low, p_high = (cached + edge[:, None] for edge in (first, last))  # [QB, 1]
    early, late = starts[:, first, None], starts[:, last, None]  # [HKV, QB, 1]
    touched = (k_low <= p_high) & ((k_high >= early) | (k_low < sink_tokens))
    fully = (k_high <= p_low) & ((late <= np.maximum(k_low, sink_tokens)) | (k_high < sink_tokens))
    return touched & ~fully, fully


def _edges(rows: int) -> tuple[Int64Array, Int64Array]:
    """First and last index of each block of `rows`."""
    first = np.arange(0, rows, BLOCK)
    return first, np.minimum(first + BLOCK - 1, rows - 1)


def _mask(
    partly: BoolArray, fully: BoolArray, keep: Keep, lengths: tuple[int, int], device: torch.device | str
) -> BlockMask:
    lists = (*_listed(partly, device), *_listed(fully, device))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=keep, seq_lengths=lengths)


def _listed(blocks: BoolArray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks and which, int32 [1, H, QB] and [1, H, QB, KB]: those seen first, in order."""
    seen = torch.from_numpy(np.ascontiguousarray(blocks)).to(device)
    order = torch.argsort(seen.to(torch.int8), dim=-1, descending=True, stable=True)
    return seen.sum(-1).to(torch.int32)[None], order.to(torch.int32)[None]
