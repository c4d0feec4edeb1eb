"""Exact banded attention of a chunk of queries, block by block: masks only on the band's edges, O(T * window) time.

A block of queries sees keys of two kinds: those that all of its queries see (sinks and the inside of the window, no
mask), and those at the two edges (where the window begins, and the block's own tokens). CPUs compute both without a
dense mask and join them by their log-sum-exp; elsewhere, under autograd, and where scores are capped, one masked call does.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from moa.kernels.band import Band, Pair, side_by_side
from moa.kernels.scores import Attended, Scores, join_attended, scored_attention
from moa.kernels.tiles import tiled_attention, tiles_run

# Measured best on CPU for windows of 1k (block sizes 64 to 1,024 tried); small windows waste less with small blocks.
BLOCK_TOKENS, SMALL_BLOCK_TOKENS, SMALL_WINDOW_TOKENS = 256, 128, 512

# A text's first tokens, so few or of heads so small that torch's causal kernel is faster than tiles are to set up:
# tokens for heads of up to 16 numbers, and for larger ones.
SHORT_TOKENS, SMALL_HEAD_DIM = (1024, 256), 16


def way_of(q: torch.Tensor, band: Band) -> str:
    """How a band is attended: by "tiles", by "flash" kernels, or by "masks"; the first two are for CPUs and have no gradient."""
    if q.device.type != "cpu" or band.needs_grad or (torch.is_grad_enabled() and q.requires_grad):
        return "masks"
    if tiles_run(q) and not _is_short(q, band):
        return "tiles"
    return "flash" if band.scores.softcap is None else "masks"


def _is_short(q: torch.Tensor, band: Band) -> bool:
    """Whether a chunk is a short text of its own whose queries see all before them."""
    count, size = q.shape[2:]
    if band.position or count > SHORT_TOKENS[size > SMALL_HEAD_DIM] or band.scores.softcap is not None:
        return False
    return int(band.starts[-1]) <= band.sink_tokens and (band.native_window is None or count <= band.native_window)


def banded_attention(q: torch.Tensor, band: Band) -> Attended:
    """Attention of queries [Hg, G, T, D] over a band: [Hg, G, T, D], and the log-sum-exp [Hg, G, T] if wanted."""
    way = way_of(q, band)
    if way == "tiles":
        return tiled_attention(q, band)
    flash = way == "flash"
    return join_attended([_attend_block(q[:, :, a:b], band, a, b, flash) for a, b in _blocks(band, flash)], 2)


def _blocks(band: Band, flash: bool) -> list[tuple[int, int]]:
    """Query ranges: even blocks, and before the first drop one causal block where the kernel needs no mask for it."""
    count = len(band.starts)
    first_drop = 0 if band.native_window else int((band.starts <= band.sink_tokens).sum())
    window = band.position + count - int(band.starts[-1])
    step = SMALL_BLOCK_TOKENS if window < SMALL_WINDOW_TOKENS else BLOCK_TOKENS
    undropped = [0] if flash and first_drop else range(0, first_drop, step)
    cuts = [*undropped, *range(first_drop, count, step), count]
    return list(pairwise(cuts))


def _attend_block(q: torch.Tensor, band: Band, a: int, b: int, flash: bool) -> Attended:
    first, stop = band.position + a, band.position + b
    low, high = int(band.starts[a]), int(band.starts[b - 1])
    sinks = min(band.sink_tokens, first)
    dying = band.native_window is not None and stop > band.native_window
    sure_sinks, edge_sinks = ((0, 0), (0, sinks)) if dying else ((0, sinks), (0, 0))
    inside = band.join(sure_sinks, (high, first))  # [Hg, n, D] each, seen by all
    edge = band.join((low, min(high, first)), (first, stop))  # [Hg, n, D] each, seen by some
    if dying and sinks:
        edge = side_by_side(band.columns(*edge_sinks), edge)
    causal = low == high and high <= max(first, band.sink_tokens) and not dying
    keys = None if causal else [*range(*edge_sinks), *range(low, min(high, first)), *range(first, stop)]
    mask = None if keys is None else _edge_mask(q, band, a, b, torch.tensor(keys, device=q.device))
    attend = _attend_flash if flash else _attend_masked
    return attend(q, inside, edge, mask, band.scores)


def _edge_mask(q: torch.Tensor, band: Band, a: int, b: int, keys: torch.Tensor) -> torch.Tensor:
    """Which query of a block sees which edge key: bool [T, n]."""
    p = torch.arange(band.position + a, band.position + b, device=q.device)[:, None]  # [T, 1]
    starts = torch.from_numpy(band.starts[a:b]).to(q.device)[:, None]  # [T, 1]
    seen = (keys <= p) & ((keys >= starts) | (keys < band.sink_tokens))
    return seen if band.native_window is None else seen & (p - keys < band.native_window)


def _attend_flash(q: torch.Tensor, inside: Pair, edge: Pair, mask: torch.Tensor | None, scores: Scores) -> Attended:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # takes HKV < HQ, gives (out, log-sum-exp)
    heads, group, count, size = q.shape
    flat = q.reshape(1, heads * group, count, size)  # [1, Hg*G, T, D]
    bias = None
    if mask is not None:  # the kernel wants a float mask in the queries' dtype
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))[None, None]  # [1, 1, T, n]
    out, lse = flash(flat, edge[0][None], edge[1][None], 0.0, mask is None, attn_mask=bias, scale=scores.scale)
    if inside[0].shape[1]:
        rest, rest_lse = flash(flat, inside[0][None], inside[1][None], 0.0, False, scale=scores.scale)
        share = torch.sigmoid(rest_lse - lse)[..., None]  # softmax mass of the inside, [1, Hg*G, T, 1]
        out, lse = (out + (rest - out) * share).to(q.dtype), torch.logaddexp(lse, rest_lse)
    out, lse = out.view(heads, group, count, size), lse.view(heads, group, count)
    return scores.add_sinks(out, lse), lse if scores.wants_lse else None


def _attend_masked(q: torch.Tensor, inside: Pair, edge: Pair, mask: torch.Tensor | None, scores: Scores) -> Attended:
    heads, group, count, size = q.shape
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()  # [T, T]
    mask = torch.cat((mask.new_ones(count, inside[0].shape[1]), mask), 1)  # [T, N]
    keys, values = side_by_side(inside, edge)  # [Hg, N, D]
    if scores.wants_lse or not scores.is_plain:
        return scored_attention(q, keys, values, mask, scores)
    flat = q.reshape(1, heads, group * count, size)  # [1, Hg, G*T, D]: GQA without repeating KV
    out = F.scaled_dot_product_attention(
        flat, keys[None], values[None], attn_mask=mask.repeat(group, 1), scale=scores.scale
    )
    return out.view(heads, group, count, size), None
