"""Exact banded attention as tiles of explicit scores: one matrix product, one softmax of whole rows, one matrix product.

A tile is a block of queries (all query heads of a KV head) and the one range of columns that holds all of its keys: the
sinks move along, always directly before the window. Masks lie on the two edges only, and nothing is merged unless a
window is so long that a tile's scores would leave the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from moa.kernels.band import Band, Pair
from moa.kernels.products import has_bfloat16_products, has_onednn, has_tile_registers, product, rounded_length
from moa.kernels.scores import Attended, Scores

# Measured best on CPU (recipes/benchmarks/kernels_cpu): rows of a tile, and at most so many tokens and keys.
TILE_ROWS, TILE_TOKENS, LEAST_TOKENS, TILE_KEYS = 256, 128, 32, 8192
HALVES = (torch.bfloat16, torch.float16)


def tiles_run(q: torch.Tensor) -> bool:
    """Whether this is the way for queries of this dtype and device, where no gradient is asked for."""
    if q.device.type != "cpu" or not has_onednn():
        return False
    return q.dtype == torch.float32 or (q.dtype in HALVES and not has_tile_registers())


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `[start, stop)` of a chunk, the columns `[first, end)` they are multiplied with, and what is hidden of those.

    `sinks` tells how many columns from `first` on hold sinks; `hidden` has masks bool [c, m], True where a query does
    not see a key, with the column that their first column is, counted from `first`.
    """

    start: int
    stop: int
    first: int
    end: int
    sinks: int
    hidden: tuple[tuple[int, torch.Tensor], ...]
    is_full: bool


def tiled_attention(q: torch.Tensor, band: Band) -> Attended:
    """Attention of queries [Hg, G, T, D] over a band: [Hg, G, T, D], and the log-sum-exp [Hg, G, T] if wanted."""
    heads, group, count, size = q.shape
    step = max(LEAST_TOKENS, min(TILE_TOKENS, TILE_ROWS // group))
    tiles = [_tile(band, a, min(a + step, count), step) for a in range(0, count, step)]
    out = q.new_empty(count, heads, group, size).permute(1, 2, 0, 3)  # [Hg, G, T, D], tokens outermost in memory
    lse = q.new_empty(heads, group, count, dtype=torch.float32) if _needs_lse(band.scores) else None
    keys, values = _working_copies(band.keys, max(tile.end for tile in tiles))  # [columns, D]
    for head in range(heads):
        own_keys, own_values = band.keys[head], band.values[head]  # [N, D]
        keys[: len(own_keys)], values[: len(own_keys)] = own_keys, own_values
        for tile in tiles:
            if tile.sinks and tile.first:
                into = slice(tile.first, tile.first + tile.sinks)
                keys[into], values[into] = own_keys[: tile.sinks], own_values[: tile.sinks]
            rows = q[head, :, tile.start : tile.stop].to(torch.float32) * band.scores.scale  # [G, c, D]
            part, part_lse = _attend_tile(rows, keys, values, tile, band.scores)
            out[head, :, tile.start : tile.stop] = part
            if lse is not None and part_lse is not None:
                lse[head, :, tile.start : tile.stop] = part_lse
    if lse is None:
        return out, None
    return band.scores.add_sinks(out, lse), lse if band.scores.wants_lse else None


def _needs_lse(scores: Scores) -> bool:
    return scores.wants_lse or scores.sinks is not None


def _tile(band: Band, a: int, b: int, step: int) -> Tile:
    """The tile of queries `[a, b)`, of `step` where it is full."""
    low, high, stop = int(band.starts[a]), int(band.starts[b - 1]), band.position + b
    first, end, sinks, hidden = low - band.shift, stop - band.shift, band.sink_tokens, []
    p = torch.arange(band.position + a, stop)[:, None]  # [c, 1]
    if band.native_window is not None and stop > band.native_window:
        lost = p - torch.arange(min(sinks, stop)) >= band.native_window  # [c, s]
        sinks = 0 if lost.all() and sinks <= band.position + a else sinks
        hidden += [(0, lost)] * (sinks > 0)
    first -= sinks
    if high > low:
        starts = torch.from_numpy(band.starts[a:b])[:, None]  # [c, 1]
        hidden.append((sinks, torch.arange(low, high) < starts))  # [c, high - low]
    length = rounded_length(end - first)
    own = torch.ones(b - a, b - a + length - (end - first), dtype=torch.bool).triu_(1)  # [c, c + padding]
    hidden.append((end - first - (b - a), own))
    return Tile(a, b, first, first + length, sinks, tuple(hidden), b - a == step)


def _working_copies(like: torch.Tensor, columns: int) -> Pair:
    """Room for one head's keys [columns, D] in float32, and its values in the dtype they are multiplied in; 0 in padding."""
    halves = like.dtype == torch.bfloat16 and has_bfloat16_products()
    keys = like.new_zeros(columns, like.shape[2], dtype=torch.float32)  # [columns, D]
    return keys, like.new_zeros(keys.shape, dtype=torch.bfloat16 if halves else torch.float32)


def _attend_tile(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: Tile, scores: Scores) -> Attended:
    """Scaled queries [G, c, D] over a tile's keys: [G, c, D], and the log-sum-exp [G, c] if needed."""
    length = tile.end - tile.first
    pieces = -(-length // TILE_KEYS)
    cuts = list(pairwise(length * i // pieces for i in range(pieces + 1)))
    wants_lse = _needs_lse(scores) or pieces > 1
    parts = [_attend_piece(rows, keys, values, tile, cut, scores, wants_lse) for cut in cuts]
    if pieces == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts if lse is not None])  # [pieces, G, c]
    shares = lses.softmax(0)[..., None]
    return (torch.stack([out for out, _ in parts]) * shares).sum(0), lses.logsumexp(0)


def _attend_piece(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tile: Tile,
    cut: tuple[int, int],
    scores: Scores,
    wants_lse: bool,
) -> Attended:
    """The same over columns `[first + cut[0], first + cut[1])`; a query that sees none of them gets a log-sum-exp of -inf."""
    group, count, size = rows.shape
    multiply = product if tile.is_full else _any_product
    columns = slice(tile.first + cut[0], tile.first + cut[1])
    s = multiply(rows.reshape(group * count, size), keys[columns])  # [G*c, n]
    if scores.softcap is not None:
        s = s.div_(scores.softcap).tanh_().mul_(scores.softcap)
    for at, mask in tile.hidden:
        _hide(s.view(group, count, -1), mask, at - cut[0])
    top = s.amax(-1) if wants_lse else None  # [G*c]
    if top is not None and (blind := top.isneginf()).any():
        s.masked_fill_(blind[:, None], 0.0)  # any numbers that are numbers: the other pieces have the whole share
    p = torch.softmax(s, -1, out=s)
    # The largest score has the largest share.
    lse = None if top is None else (top - p.amax(-1).log()).view(group, count)
    return multiply(p.to(values.dtype), values[columns].mT).view(group, count, size), lse


def _any_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`product` for shapes that come once."""
    return a @ b.mT


def _hide(s: torch.Tensor, mask: torch.Tensor, at: int) -> None:
    """Scores [G, c, n] under a mask [c, m] whose first column is column `at`, which may lie outside, become -inf."""
    a, b = max(at, 0), min(at + mask.shape[1], s.shape[2])
    if a < b:
        s[:, :, a:b].masked_fill_(mask[:, a - at : b - at], float("-inf"))
