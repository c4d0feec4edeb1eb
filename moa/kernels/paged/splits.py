"""How the attention of a step is cut into work items: the plain reference of `plan_kernel`, and the order of prefill tiles.

A tile is up to ROWS rows of one slice; its rows are (token, query head of the KV head) pairs, row = token * G + head. What a
tile visits for one KV head comes in units of 64 keys: sink pages, window pages, blocks of fresh keys. An item (tile, KV
head) with many units is cut into splits that different thread blocks work on; partial results are merged by log-sum-exp.
The rule: the smallest chunk, at least 256 tokens, with `sum ceil(units / chunk) <= capacity`, then each item evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moa.kernels.paged.pool import PAGE_TOKENS, Int32Array
from moa.spans import Int64Array, span

UNIT_TOKENS = PAGE_TOKENS
MIN_CHUNK_UNITS = 4
# Launch order is by so many buckets of split length. Even splits are of nearly one length: in the tests' model of launches
# finer buckets change nothing, and none at all costs or gains a percent.
BUCKETS = 8


class Item(NamedTuple):
    """Columns of the work list and of the item table.

    Of a work list's row, `[unit_from, unit_to)` is one split's share and `slot` its partial result, -1 where the split
    is the whole item and writes the output itself. Of an item's row they are all its units and its first slot. Rows that
    pad a list visit nothing and have no splits.
    """

    slice: int
    kv_head: int
    row_from: int
    row_count: int
    unit_from: int
    unit_to: int
    slot: int
    n_splits: int


NO_ITEM = Item(0, 0, 0, 0, 0, 0, -1, 0)


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no single truth value to compare by
class HeadRules:
    """The rules of a model's KV heads as kernels read them.

    Args:
        rules: alpha, beta in 1/65536 and the model's own window in tokens, int64 [R, 3].
        rule_of_head: int32 [L, HKV].
        sink_tokens: first tokens that every head keeps.
        min_span_tokens: least span.
    """

    rules: Int64Array
    rule_of_head: Int32Array
    sink_tokens: int
    min_span_tokens: int


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no single truth value to compare by
class Step:
    """The slices of a step as kernels read them.

    Args:
        slices: offset, tokens, position and slot, int32 [S, 4]; slices without tokens pad the table.
        pinned: the length that was pinned per slice, int64 [S]; 0 in running mode.
        group: query heads of a KV head.
    """

    slices: Int32Array
    pinned: Int64Array
    group: int


def plan_capacity(n_items: int, slots: int) -> int:
    """Rows of a work list: the rule never makes more splits, whatever the lengths, so a CUDA graph can replay it."""
    return max(2 * slots, n_items + slots)


def decode_tiles(n_slices: int) -> Int32Array:
    """One tile (slice, first row) per slice, [S, 2]."""
    return np.stack((np.arange(n_slices), np.zeros(n_slices)), 1).astype(np.int32)


def row_tiles(step: Step, rows: int) -> Int32Array:
    """All tiles (slice, first row) of `rows` rows, in the slices' order, [M, 2]."""
    tiles = [
        (i, first)
        for i, tokens in enumerate(step.slices[:, 1].tolist())
        for first in range(0, tokens * step.group, rows)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 2)


def count_rows(step: Step, tiles: Int32Array, rows: int) -> Int64Array:
    """Rows of each tile, [M]."""
    held: Int64Array = step.slices[tiles[:, 0], 1].astype(np.int64) * step.group - tiles[:, 1]
    return held.clip(0, rows)


def count_units(step: Step, tiles: Int32Array, rows: int, heads: HeadRules) -> Int64Array:
    """Units that each tile visits under each rule, [M, R]: what lies between the first row's window and the last row.

    A unit is visited if it holds a key that the first row's rule keeps, or a fresh key up to the last row.
    """
    count = count_rows(step, tiles, rows)[:, None]  # [M, 1]
    first, last = tiles[:, 1:] // step.group, (tiles[:, 1:] + np.maximum(count, 1) - 1) // step.group
    cached = step.slices[tiles[:, 0], 2].astype(np.int64)[:, None]
    alpha, beta, native = heads.rules.T  # [R]
    seen = cached + first + 1
    pinned = step.pinned[tiles[:, 0]][:, None]
    kept = span(alpha, beta, np.where(pinned > 0, pinned, seen), heads.min_span_tokens)  # [M, R]
    sink = heads.sink_tokens
    window = np.maximum(np.maximum(seen - (kept - sink), sink), seen - native)
    sink_from = np.clip(seen - native, 0, sink)
    of_cache = _pages(sink_from, np.minimum(sink, cached), window, cached)
    end = cached + last + 1
    sinks, rest = (np.maximum(x, cached) - cached for x in (sink_from, window))
    of_fresh = _pages(sinks, np.minimum(sink, end) - cached, rest, end - cached)
    units: Int64Array = np.where(count > 0, of_cache + of_fresh, 0)
    return units


def _pages(sink_from: Int64Array, sink_to: Int64Array, window_from: Int64Array, window_to: Int64Array) -> Int64Array:
    """Units that meet either range of keys; the window begins at or above the sinks' end."""
    first = sink_from // UNIT_TOKENS
    stop = np.where(sink_to > sink_from, -(-sink_to // UNIT_TOKENS), first)
    window = -(-window_to // UNIT_TOKENS) - np.maximum(window_from // UNIT_TOKENS, stop)
    return stop - first + np.where(window_to > window_from, np.maximum(window, 0), 0)


def chunk_units(units: Int64Array, capacity: int) -> int:
    """The smallest chunk, in units and at least 256 tokens, whose splits fit the capacity."""
    low, high = MIN_CHUNK_UNITS, max(MIN_CHUNK_UNITS, int(units.max(initial=0)))
    while low < high:
        middle = (low + high) // 2
        if (-(-units // middle)).sum() <= capacity:
            high = middle
        else:
            low = middle + 1
    return low


def plan_splits(
    step: Step, tiles: Int32Array, rows: int, heads: HeadRules, layer: int, slots: int
) -> tuple[Int32Array, Int32Array]:
    """The work list and the item table of a layer.

    Args:
        step: the slices.
        tiles: (slice, first row), [M, 2].
        rows: rows of a tile.
        heads: rules of the KV heads.
        layer: index of the layer.
        slots: thread blocks that the GPU runs at once.

    Returns:
        splits [plan_capacity, 8], longest first, and items [M * HKV, 8] in tile-major order; columns as in `Item`.
    """
    rule = heads.rule_of_head[layer]  # [HKV]
    units = count_units(step, tiles, rows, heads)[:, rule].reshape(-1)  # [M * HKV]
    capacity = plan_capacity(len(units), slots)
    chunk = chunk_units(units, capacity)
    n_splits = -(-units // chunk)
    partials = np.where(n_splits > 1, n_splits, 0)
    first_slot = np.where(n_splits > 1, np.cumsum(partials) - partials, -1)
    counts = count_rows(step, tiles, rows)
    items = np.zeros((len(units), len(Item._fields)), dtype=np.int32)
    items[:, 0], items[:, 2], items[:, 3] = (np.repeat(x, len(rule)) for x in (tiles[:, 0], tiles[:, 1], counts))
    items[:, 1] = np.tile(np.arange(len(rule)), len(tiles))
    items[:, 5], items[:, 6], items[:, 7] = units, first_slot, n_splits
    work = np.tile(np.array(NO_ITEM, dtype=np.int32), (capacity, 1))
    splits = [
        _share(Item(*items[i].tolist()), j) for i in launch_order(units, n_splits, chunk) for j in range(n_splits[i])
    ]
    if splits:
        work[: len(splits)] = splits
    return work, items


def launch_order(units: Int64Array, n_splits: Int64Array, chunk: int) -> Int64Array:
    """Items by bucket of their longest split, longest first; in one bucket they keep their order."""
    longest = -(-units // np.maximum(n_splits, 1))
    return np.argsort((chunk - longest) * BUCKETS // chunk, kind="stable")


def _share(item: Item, j: int) -> Item:
    """The j-th split: whole units, the first splits one more where they do not divide."""
    base, extra = divmod(item.unit_to, item.n_splits)
    begin = j * base + min(j, extra)
    slot = item.slot + j if item.n_splits > 1 else -1
    return item._replace(unit_from=begin, unit_to=begin + base + (j < extra), slot=slot)


def order_tiles(step: Step, tiles: Int32Array, rows: int, heads: HeadRules) -> Int32Array:
    """Tiles in launch order: longest first by the units they visit on average over all layers and KV heads.

    For one sequence that is the order of its rows from the last to the first, over all heads; sorting the heads of a tile
    too gains nothing then (`tests/kernels/paged/test_splits.py` simulates the load).
    """
    share = np.bincount(heads.rule_of_head.reshape(-1), minlength=len(heads.rules))  # [R]
    cost = count_units(step, tiles, rows, heads) @ share  # [M]
    return tiles[np.lexsort((-tiles[:, 1], -cost))]
