"""The planner of splits on the device: one thread block per layer, no host in between, lists of fixed length.

`moa.kernels.paged.splits.plan_splits` is its reference, and equal to it in every number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa.kernels.paged.splits import BUCKETS as _BUCKETS
from moa.kernels.paged.splits import MIN_CHUNK_UNITS as _MIN_CHUNK_UNITS
from moa.kernels.paged.units import sink_start, unit_ranges, window_start

BUCKETS = tl.constexpr(_BUCKETS)
MIN_CHUNK_UNITS = tl.constexpr(_MIN_CHUNK_UNITS)
COLUMNS = tl.constexpr(8)


@triton.jit
def _item_units(SLICES, PINNED, RULES, TILES, p_rule, i_tile, m_i, sink, least, G: tl.constexpr, ROWS: tl.constexpr):
    """Slice, first row, rows and visited units of items; 0 rows and units where `m_i` is false."""
    b_slice = tl.load(TILES + i_tile * 2, mask=m_i, other=0)
    b_row = tl.load(TILES + i_tile * 2 + 1, mask=m_i, other=0)
    tokens = tl.load(SLICES + b_slice * 4 + 1, mask=m_i, other=0)
    cached = tl.load(SLICES + b_slice * 4 + 2, mask=m_i, other=0).to(tl.int64)
    pinned = tl.load(PINNED + b_slice, mask=m_i, other=0)
    b_count = tl.minimum(tl.maximum(tokens * G - b_row, 0), ROWS)

    rule = tl.load(p_rule, mask=m_i, other=0) * 3
    alpha = tl.load(RULES + rule, mask=m_i, other=0)
    beta = tl.load(RULES + rule + 1, mask=m_i, other=0)
    native = tl.load(RULES + rule + 2, mask=m_i, other=0)
    first = cached + b_row // G
    last = cached + (b_row + tl.maximum(b_count, 1) - 1) // G
    lo = window_start(first, pinned, alpha, beta, native, sink, least)
    _, n0, _, n1, _, n2, _, n3 = unit_ranges(cached, last, sink_start(first, native, sink), lo, sink)
    return b_slice, b_row, b_count, tl.where(b_count > 0, n0 + n1 + n2 + n3, 0).to(tl.int32)


@triton.jit
def _smallest_chunk(b_units, capacity):
    """As `splits.chunk_units`. The bounds that hold whatever the lengths leave a search of a few steps:
    total / chunk <= sum ceil(units / chunk) <= total / chunk + items that are not empty."""
    total = tl.sum(b_units.to(tl.int64))
    n_busy = tl.sum((b_units > 0).to(tl.int32))
    low = tl.maximum(tl.cdiv(total, capacity), MIN_CHUNK_UNITS).to(tl.int32)
    high = tl.cdiv(total, tl.maximum(capacity - n_busy, 1)).to(tl.int32)
    high = tl.maximum(low, tl.minimum(high, tl.max(b_units)))
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(b_units, middle)) <= capacity
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return low


@triton.jit
def _launch_positions(b_units, b_splits, chunk):
    """Where each item's splits begin in the work list: by bucket of the longest split, in one bucket by item."""
    longest = tl.cdiv(b_units, tl.maximum(b_splits, 1))
    b_bucket = (chunk - longest) * BUCKETS // chunk
    b_start = tl.zeros_like(b_splits)
    filled = 0
    for i in range(BUCKETS):
        m_here = b_bucket == i
        here = tl.where(m_here, b_splits, 0)
        b_start = tl.where(m_here, filled + tl.cumsum(here, 0) - here, b_start)
        filled += tl.sum(here)
    return b_start


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _write_rows(p_work, p_items, i_block, start, item, n_live, capacity, BLOCK: tl.constexpr):
    """A block of rows of the work list; `start` and `item` are of the row before it, and those of the last row result."""
    o_w = i_block * BLOCK + tl.arange(0, BLOCK)
    m_w = o_w < capacity
    m_live = o_w < n_live
    p_row = p_work + o_w * COLUMNS
    b_mark = tl.load(p_row, mask=m_w, other=-1)
    b_start = tl.maximum(tl.associative_scan(tl.where(b_mark >= 0, o_w, 0), 0, _larger), start)
    b_item = tl.load(p_work + b_start * COLUMNS, mask=m_live & (b_start >= i_block * BLOCK), other=0)
    b_item = tl.where(b_start >= i_block * BLOCK, b_item, item)  # rows before this block hold their marks no more
    tl.debug_barrier()

    p_item = p_items + b_item * COLUMNS
    units = tl.load(p_item + 5, mask=m_live, other=0)
    first_slot = tl.load(p_item + 6, mask=m_live, other=-1)
    n_splits = tl.load(p_item + 7, mask=m_live, other=0)
    i_split = o_w - b_start
    base, extra = units // tl.maximum(n_splits, 1), units % tl.maximum(n_splits, 1)
    begin = i_split * base + tl.minimum(i_split, extra)
    for i in tl.static_range(4):
        tl.store(p_row + i, tl.load(p_item + i, mask=m_live, other=0), mask=m_w)
    tl.store(p_row + 4, tl.where(m_live, begin, 0), mask=m_w)
    tl.store(p_row + 5, tl.where(m_live, begin + base + (i_split < extra), 0), mask=m_w)
    tl.store(p_row + 6, tl.where(n_splits > 1, first_slot + i_split, -1), mask=m_w)
    tl.store(p_row + 7, n_splits, mask=m_w)
    return tl.max(b_start), tl.max(tl.where(o_w == i_block * BLOCK + BLOCK - 1, b_item, 0))


@triton.jit(do_not_specialize=["n_tiles", "n_heads", "sink", "least", "capacity"])
def plan_kernel(
    SLICES, PINNED, RULES, RULE_OF_HEAD, TILES, WORK, ITEMS, LIVE,
    n_tiles, n_heads, sink, least, capacity,
    G: tl.constexpr, ROWS: tl.constexpr, ITEMS_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WORK int32 [L, capacity, 8], ITEMS int32 [L, M * HKV, 8] and LIVE int32 [L] from SLICES int32 [S, 4], PINNED
    int64 [S], RULES int64 [R, 3], RULE_OF_HEAD int32 [L, HKV] and TILES int32 [M, 2]. Grid (L,)."""
    i_l = tl.program_id(0).to(tl.int64)
    o_i = tl.arange(0, ITEMS_P)
    m_i = o_i < n_tiles * n_heads
    i_tile, i_head = o_i // n_heads, o_i % n_heads
    p_rule = RULE_OF_HEAD + i_l * n_heads + i_head
    b_slice, b_row, b_count, b_units = _item_units(
        SLICES, PINNED, RULES, TILES, p_rule, i_tile, m_i, sink, least, G, ROWS
    )
    chunk = _smallest_chunk(b_units, capacity)
    b_splits = tl.cdiv(b_units, chunk)
    partials = tl.where(b_splits > 1, b_splits, 0)
    b_slot = tl.where(b_splits > 1, tl.cumsum(partials, 0) - partials, -1)

    p_item = ITEMS + (i_l * n_tiles * n_heads + o_i) * COLUMNS
    tl.store(p_item + 0, b_slice, mask=m_i)
    tl.store(p_item + 1, i_head, mask=m_i)
    tl.store(p_item + 2, b_row, mask=m_i)
    tl.store(p_item + 3, b_count, mask=m_i)
    tl.store(p_item + 4, tl.zeros_like(b_units), mask=m_i)
    tl.store(p_item + 5, b_units, mask=m_i)
    tl.store(p_item + 6, b_slot, mask=m_i)
    tl.store(p_item + 7, b_splits, mask=m_i)

    # Each item writes its number where its splits begin; a running maximum tells every row where its item began.
    p_work = WORK + i_l * capacity * COLUMNS
    for i in range(tl.cdiv(capacity, BLOCK)):
        o_w = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(p_work + o_w * COLUMNS, tl.full([BLOCK], -1, tl.int32), mask=o_w < capacity)
    tl.debug_barrier()
    b_start = _launch_positions(b_units, b_splits, chunk)
    tl.store(p_work + b_start * COLUMNS, o_i, mask=m_i & (b_splits > 0))
    n_live = tl.sum(b_splits)
    tl.store(LIVE + i_l, n_live)
    start, item = 0, 0  # of the last row so far
    for i in range(tl.cdiv(capacity, BLOCK)):
        tl.debug_barrier()
        start, item = _write_rows(
            p_work, ITEMS + i_l * n_tiles * n_heads * COLUMNS, i, start, item, n_live, capacity, BLOCK
        )
