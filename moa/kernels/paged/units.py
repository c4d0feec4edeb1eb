"""Device functions that say which units of 64 keys a tile visits; planner and attention kernels must agree on every one.

`moa.kernels.paged.splits.count_units` is their reference. All work on numbers and on blocks alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa.kernels.paged.splits import UNIT_TOKENS as _UNIT_TOKENS
from moa.spans import BETA_BITS as _BETA_BITS

UNIT_TOKENS = tl.constexpr(_UNIT_TOKENS)
BETA_BITS = tl.constexpr(_BETA_BITS)


@triton.jit
def window_start(position, pinned, alpha, beta, native, sink, least):
    """lo(p) as `moa.spans` has it, and no further back than the model's own window; int64."""
    seen = tl.cast(position, tl.int64) + 1
    n = tl.where(pinned > 0, pinned, seen)
    span = tl.minimum(n, tl.maximum(least, alpha - ((-beta * n) >> BETA_BITS)))
    return tl.maximum(tl.maximum(seen - (span - sink), sink), seen - native)


@triton.jit
def sink_start(position, native, sink):
    """The first sink that a query at `position` sees; `sink` if none; int64."""
    return tl.minimum(tl.maximum(tl.cast(position, tl.int64) + 1 - native, 0), sink)


@triton.jit
def _pages(sink_from, sink_to, window_from, window_to):
    """First unit and number of units that meet the sinks [sink_from, sink_to), and of those that meet the window only."""
    first = sink_from // UNIT_TOKENS
    stop = tl.where(sink_to > sink_from, tl.cdiv(sink_to, UNIT_TOKENS), first)
    window = tl.maximum(window_from // UNIT_TOKENS, stop)
    count = tl.maximum(tl.cdiv(window_to, UNIT_TOKENS) - window, 0)
    return first, stop - first, window, tl.where(window_to > window_from, count, 0)


@triton.jit
def unit_ranges(cached, last, sink_from, lo, sink):
    """The four runs of units of a tile, in the order in which they count: (first unit, number of units) each.

    Pages of cached sinks and of the cached window, by absolute position; then blocks of fresh sinks and of the fresh
    window, counted from the slice's first token. `cached` tokens lie in the cache, `last` is the position of the last
    row, `sink_from` and `lo` are the first row's.
    """
    p0, n0, p1, n1 = _pages(sink_from, tl.minimum(sink, cached), lo, cached)
    end = last + 1
    sinks, rest = tl.maximum(sink_from - cached, 0), tl.maximum(lo - cached, 0)
    p2, n2, p3, n3 = _pages(sinks, tl.minimum(sink, end) - cached, rest, end - cached)
    return p0, n0, p1, n1, p2, n2, p3, n3
