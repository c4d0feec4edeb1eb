"""What a step launches: tiles of prefill, splits of decodes, blocks to append. Made once, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moa.kernels.batch import Batch
from moa.kernels.paged.launch import APPEND_TOKENS, Heads
from moa.kernels.paged.planner import PlannerInput, SplitLists, plan_splits
from moa.kernels.paged.splits import HeadRules, Int32Array, Step, count_rows, order_tiles, row_tiles
from moa.kernels.paged.tiles import Tile, decode_tile, prefill_tile

ALL_UNITS = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Lists:
    """Work of a step for queries with one number of heads per KV head.

    Args:
        prefill: entries int32 [entries, 8] for all layers, longest first, and their tile; None without prefill.
        decode: splits per layer, and their tile; None without decodes.
        blocks: slice and first token of what one program appends, int32 [blocks, 2].
    """

    prefill: tuple[torch.Tensor, Tile] | None
    decode: tuple[SplitLists, Tile] | None
    blocks: torch.Tensor


def make_lists(
    batch: Batch,
    slices: torch.Tensor,
    pinned: torch.Tensor,
    heads: Heads,
    rules: HeadRules,
    group: int,
    q: torch.Tensor,
    slots: int,
) -> Lists:
    """Cut a step into work.

    Args:
        batch: the step.
        slices: offset, tokens, position and slot, int32 [S, 4], on the device.
        pinned: pinned lengths or 0, int64 [S], on the device.
        heads: rules on the device.
        rules: the same on the host.
        group: query heads of a KV head.
        q: queries [T, HQ, D], of which size and dtype count.
        slots: thread blocks of decode that the device runs at once.
    """
    account = np.array([(s.offset, s.tokens, s.position, 0) for s in batch.slices], dtype=np.int32).reshape(-1, 4)
    step = Step(account, pinned.cpu().numpy(), group)
    size, width, device = q.shape[2], q.element_size(), q.device
    tile, wide = decode_tile(size, width), prefill_tile(size, width)
    is_decode = account[:, 1] * group <= tile.rows
    all_tiles = row_tiles(step, wide.rows)
    tiles = order_tiles(step, all_tiles[~is_decode[all_tiles[:, 0]]], wide.rows, rules)
    prefill = decode = None
    if len(tiles):
        work = _entries(tiles, count_rows(step, tiles, wide.rows), rules.rule_of_head.shape[1])
        prefill = torch.from_numpy(work).to(device), wide
    if is_decode.any():
        decode = _plan(np.flatnonzero(is_decode), slices, pinned, heads, group, tile, slots), tile
    blocks = [(i, first) for i, s in enumerate(batch.slices) for first in range(0, s.tokens, APPEND_TOKENS)]
    return Lists(prefill, decode, torch.tensor(blocks, dtype=torch.int32).view(-1, 2).to(device))


def _entries(tiles: Int32Array, counts: np.ndarray, n_heads: int) -> Int32Array:
    """Work of whole tiles, the heads of a tile side by side as they lie in memory: int32 [M * HKV, 8]."""
    work = np.zeros((len(tiles) * n_heads, 8), dtype=np.int32)
    work[:, 0], work[:, 2], work[:, 3] = (np.repeat(x, n_heads) for x in (tiles[:, 0], tiles[:, 1], counts))
    work[:, 1] = np.tile(np.arange(n_heads), len(tiles))
    work[:, 5], work[:, 6], work[:, 7] = ALL_UNITS, -1, 1
    return work


def _plan(
    decodes: np.ndarray, slices: torch.Tensor, pinned: torch.Tensor, heads: Heads, group: int, tile: Tile, slots: int
) -> SplitLists:
    tiles = np.stack((decodes, np.zeros_like(decodes)), 1).astype(np.int32)
    n_layers, n_heads = heads.rule_of_head.shape
    lists = SplitLists.empty(n_layers, len(tiles), n_heads, slots, slices.device)
    given = PlannerInput(
        slices,
        pinned,
        torch.from_numpy(tiles).to(slices.device),
        heads.rules,
        heads.rule_of_head,
        heads.sink_tokens,
        heads.min_span_tokens,
    )
    plan_splits(given, group, tile.rows, lists)
    return lists
