"""The tile that every attention kernel here runs: some rows of one slice and KV head, over a range of its key units.

A row is a (token, query head) pair: row `r` of a slice is token `r // G` and query head `r % G` of the KV head. Keys are
visited in units of 64, those that `moa.kernels.paged.units` lists: pages with sinks, pages of the window, then blocks of
the step's own keys. Units that no row sees are not visited. A unit that all rows see whole runs without mask code.

Scores are in base 2. `moa.kernels.reference` is the plain reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa.kernels.paged.units import UNIT_TOKENS as PAGE
from moa.kernels.paged.units import sink_start, unit_ranges, window_start

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)  # beyond every position; a native window of this size is none


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _visits(position, first, last, pinned, p_rule, sink, least):
    """Units that tokens [first, last] of a slice visit, of pages and of fresh keys, and which of them all rows see whole.

    Returns:
        pages and fresh blocks, each as `_unmasked` gives them; where the window of the first token begins; the model's
        own window. All int32.
    """
    alpha, beta, native = tl.load(p_rule), tl.load(p_rule + 1), tl.load(p_rule + 2)
    low = window_start(position + first, pinned, alpha, beta, native, sink, least)
    edge = window_start(position + last, pinned, alpha, beta, native, sink, least).to(tl.int32)
    n_pages = unit_ranges(position, position + last, sink_start(position + first, native, sink), low, sink)
    native = tl.minimum(native, FAR).to(tl.int32)
    seen = position + last + 1 - native  # where the model's own window begins for the last token
    # Where the last token drops nothing but by the model's own window, sinks and window are one.
    drops = edge > tl.maximum(sink, seen)
    sinks_end = tl.where(drops, sink, FAR)
    edge = tl.where(drops, edge, seen)
    p0, n0, p1, n1, p2, n2, p3, n3 = n_pages
    # Unmasked pages are full of tokens; unmasked blocks lie at or before the first row's own token.
    pages = _unmasked(p0, n0, p1, n1, 0, position, seen, sinks_end, edge)
    blocks = _unmasked(p2, n2, p3, n3, position, first + 1, seen, sinks_end, edge)
    return pages, blocks, low.to(tl.int32), native


@triton.jit
def _unmasked(a, n_a, b, n_b, origin, stop, seen, sinks_end, edge):
    """Two runs of units, [a, a + n_a) of the sinks and [b, b + n_b) of the window, and their parts without masks.

    Positions of keys count from `origin` in units; keys from `stop` on are not whole. The parts are indices into the list
    of both runs: [x0, x1) of the sinks and [y0, y1) of the window.
    """
    whole = stop // PAGE
    sinks_whole = tl.minimum(whole, tl.maximum(sinks_end - origin, 0) // PAGE)
    a, n_a, b, n_b = a.to(tl.int32), n_a.to(tl.int32), b.to(tl.int32), n_b.to(tl.int32)
    x0 = _clip(tl.cdiv(tl.maximum(seen - origin, 0), PAGE) - a, 0, n_a)
    x1 = _clip(sinks_whole - a, x0, n_a)
    y0 = _clip(tl.cdiv(tl.maximum(edge - origin, 0), PAGE) - b, 0, n_b)
    y1 = _clip(whole - b, y0, n_b)
    return a, n_a, b, n_b, x0, x1, n_a + y0, n_a + y1


@triton.jit
def _load_rows(p_x, stride, m_rows, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows [BN, DP] from `p_x` on, zeros where `m_rows` is False if MASKED, and beyond D."""
    o_d = tl.arange(0, DP)[None, :]
    p_rows = p_x + (tl.arange(0, BN)[:, None] * stride + o_d)
    if MASKED:
        return tl.load(p_rows, mask=m_rows[:, None] & (o_d < D), other=0.0)
    elif DP > D:
        return tl.load(p_rows, mask=o_d < D, other=0.0)
    else:
        return tl.load(p_rows)


@triton.jit
def _as(b_x, like, UPCAST: tl.constexpr):
    """A loaded block in the dtype that is multiplied; Triton's interpreter cannot multiply bfloat16."""
    if UPCAST:
        return b_x.to(tl.float32)
    else:
        return b_x.to(like)


@triton.jit
def _softmax_step(
    b_q, b_k, b_v, b_ks, b_vs, m_seen, b_max, b_sum, b_acc, factor, cap,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax. `factor` is above 0: the scores' scale, or with SOFTCAP that of the tanh."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if SCALED:
        b_s *= b_ks[None, :]
    if SOFTCAP:
        b_s = (1 - 2 / (1 + tl.exp2(b_s * factor))) * cap
        scale = 1.0
    else:
        scale = factor
    if MASKED:
        b_s = tl.where(m_seen, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    # no inf - inf in rows that saw nothing yet
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_p = tl.exp2(b_s * scale - b_safe[:, None])
    b_shrink = tl.exp2(b_max - b_safe)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    if SCALED:
        b_p *= b_vs[None, :]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def _unit(i, runs, start, x0, x1, y0, y1, MASKED: tl.constexpr):
    """The i-th unit of a sweep from `start` on: of those outside of [x0, x1) and [y0, y1) if MASKED, else inside."""
    if MASKED:
        u = start + i
        u += tl.where(u >= x0, x1 - x0, 0)
        u += tl.where(u >= y0, y1 - y0, 0)
    else:
        u = x0 + i
        u += tl.where(u >= x1, y0 - x1, 0)
    return tl.where(u < runs[1], runs[0] + u, runs[2] + u - runs[1])


@triton.jit
def _sweep(
    state, b_q, b_at, b_lo, keys, codes, runs, start, stop, position, limit, low, sink, native, factor, cap,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, PAGED: tl.constexpr,
    SCALED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The units [start, stop) of two runs: the unmasked ones, or those that need masks.

    keys holds (K, V, page table, strides of a row of K and V); for pages `codes` (_, _, scales of K, scales of V). Of the keys,
    those at `limit` and after do not exist: a position for pages, a token of the slice for fresh ones.
    """
    b_max, b_sum, b_acc = state
    x0, x1, y0, y1 = (
        _clip(runs[4], start, stop),
        _clip(runs[5], start, stop),
        _clip(runs[6], start, stop),
        _clip(runs[7], start, stop),
    )
    whole = x1 - x0 + y1 - y0
    SUB: tl.constexpr = 64 // BN  # not PAGE: the interpreter knows no int % constexpr
    count = (stop - start - whole if MASKED else whole) * SUB
    unit = _unit(0, runs, start, x0, x1, y0, y1, MASKED)
    page = unit
    if PAGED:
        page = tl.load(keys[2] + unit, mask=count > 0, other=0)
    for i in range(count):
        inside = (i % SUB) * BN
        begin = unit * PAGE + inside
        row = (page if PAGED else unit).to(tl.int64) * PAGE + inside
        # The next page is looked up one turn ahead: the compiler keeps but one turn of keys in flight behind a look-up.
        unit = _unit((i + 1) // SUB, runs, start, x0, x1, y0, y1, MASKED)
        if PAGED:
            page = tl.load(keys[2] + unit, mask=i + 1 < count, other=0)
        o_n = begin + tl.arange(0, BN)
        m_n = o_n < limit
        m_seen = m_n[None, :]
        if MASKED:
            b_j = o_n if PAGED else o_n + position
            if PAGED:  # slots of a page that no token survived in were never written
                m_n &= (b_j < sink) | (b_j >= low)
            m_seen = (b_j[None, :] <= b_at[:, None]) & (b_j[None, :] > b_at[:, None] - native)
            m_seen &= (b_j[None, :] < sink) | (b_j[None, :] >= b_lo[:, None])
            m_seen &= m_n[None, :]
        b_k = _load_rows(keys[0] + row * keys[3], keys[3], m_n, BN, D, DP, MASKED)
        b_v = _load_rows(keys[1] + row * keys[4], keys[4], m_n, BN, D, DP, MASKED)
        b_ks = m_n
        b_vs = m_n
        if SCALED:
            b_ks = tl.load(codes[2] + row + tl.arange(0, BN), mask=m_n, other=0.0)
            b_vs = tl.load(codes[3] + row + tl.arange(0, BN), mask=m_n, other=0.0)
        b_max, b_sum, b_acc = _softmax_step(
            b_q, _as(b_k, b_q.dtype, UPCAST), _as(b_v, b_q.dtype, UPCAST), b_ks, b_vs, m_seen, b_max, b_sum, b_acc,
            factor, cap, SOFTCAP, SCALED, MASKED, PRECISION,
        )  # fmt: skip
    return b_max, b_sum, b_acc


@triton.jit
def attend_tile(
    q, out, fresh, pool, codes, item, spans, partials, SINK_LOGITS, factor, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QUANT: tl.constexpr,
    SHORT: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One entry of a work list.

    Args:
        q: (queries [T, HQ, D], strides of a token and a head).
        out: (output [T, HQ, D], strides of a token and a head, log-sum-exp float32 [T, HQ], its stride of a token).
        fresh: (keys of the step at this slice and head, values, strides of a token of each).
        pool: (keys [pages, 64, D], values, page table of this slice and head).
        codes: the same of the quantised pool without its table, and scales of keys and values [pages, 64].
        item: (first packed token, position, head, first row, rows, first unit, end of the units, slot of a partial
            result or -1).
        spans: (pinned length or 0, pointer to the rule, sinks, least span).
        partials: (float32 [slots, BM, D], log-sum-exp in base 2 [slots, BM]).
        SINK_LOGITS: float32 [HQ], read if HAS_SINKS.
        factor, cap: the scores' scale times log2(e) and 0; with SOFTCAP `2 log2(e) scale / softcap` and `softcap log2(e)`.
        QUANT: pages beyond those with sinks lie in the quantised pool.
        SHORT: every slice of the list has fewer than 64 tokens, so its own keys always need masks.
    """
    offset, position, head, row_from, row_count, unit_from, unit_to, slot = item
    first, last = row_from // G, (row_from + row_count - 1) // G
    pinned, p_rule, sink, least = spans
    pages, blocks, low, native = _visits(position, first, last, pinned, p_rule, sink, least)

    o_r = row_from + tl.arange(0, BM)
    m_r = tl.arange(0, BM) < row_count
    o_t = (offset + o_r // G).to(tl.int64)
    o_h = head * G + o_r % G
    o_d = tl.arange(0, DP)
    m_out = m_r[:, None] & (o_d[None, :] < D)
    b_q = tl.load(q[0] + (o_t * q[1] + o_h * q[2])[:, None] + o_d[None, :], mask=m_out, other=0.0)
    b_q = _as(b_q, b_q.dtype, UPCAST)
    b_at = position + o_r // G
    b_lo = window_start(b_at, pinned, tl.load(p_rule), tl.load(p_rule + 1), tl.load(p_rule + 2), sink, least).to(
        tl.int32
    )

    b_max = tl.full([BM], float("-inf"), tl.float32)
    state = b_max, tl.zeros([BM], tl.float32), tl.zeros([BM, DP], tl.float32)
    n_pages = pages[1] + pages[3]
    start, stop = _clip(unit_from, 0, n_pages), _clip(unit_to, 0, n_pages)
    keys, runs = (pool[0], pool[1], pool[2], D, D), pages
    if QUANT:  # sinks in the model's dtype: so few pages that all take the masked loop
        n_a = pages[1]
        runs = pages[0], n_a, pages[2], pages[3], 0, 0, n_a, n_a
        state = _sweep(
            state, b_q, b_at, b_lo, keys, codes, runs, tl.minimum(start, n_a), tl.minimum(stop, n_a), position, position,
            low, sink, native, factor, cap, D, DP, BN, SOFTCAP, True, False, True, UPCAST, PRECISION,
        )  # fmt: skip
        start, stop = tl.maximum(start, n_a), tl.maximum(stop, n_a)
        runs = pages[0], n_a, pages[2], pages[3], n_a, n_a, pages[6], pages[7]
        keys = codes[0], codes[1], pool[2], D, D
    state = _sweep(
        state, b_q, b_at, b_lo, keys, codes, runs, start, stop, position, position, low, sink, native, factor, cap,
        D, DP, BN, SOFTCAP, True, QUANT, False, UPCAST, PRECISION,
    )  # fmt: skip
    state = _sweep(
        state, b_q, b_at, b_lo, keys, codes, runs, start, stop, position, position, low, sink, native, factor, cap,
        D, DP, BN, SOFTCAP, True, QUANT, True, UPCAST, PRECISION,
    )  # fmt: skip

    n_fresh = blocks[1] + blocks[3]
    start, stop = _clip(unit_from - n_pages, 0, n_fresh), _clip(unit_to - n_pages, 0, n_fresh)
    keys = fresh[0], fresh[1], fresh[0], fresh[2], fresh[3]
    if not SHORT:
        state = _sweep(
            state, b_q, b_at, b_lo, keys, codes, blocks, start, stop, position, last + 1, low, sink, native, factor, cap,
            D, DP, BN, SOFTCAP, False, False, False, UPCAST, PRECISION,
        )  # fmt: skip
    state = _sweep(
        state, b_q, b_at, b_lo, keys, codes, blocks, start, stop, position, last + 1, low, sink, native, factor, cap,
        D, DP, BN, SOFTCAP, False, False, True, UPCAST, PRECISION,
    )  # fmt: skip

    b_max, b_sum, b_acc = state
    b_some = tl.where(b_sum == 0, 1.0, b_sum)
    b_out = b_acc / b_some[:, None]
    b_lse = tl.where(b_sum == 0, float("-inf"), b_max + tl.log2(b_some))
    if slot < 0:
        store_rows(out, SINK_LOGITS, b_out, b_lse, o_t, o_h, m_r, D, DP, HAS_SINKS)
    else:
        o_p = tl.cast(slot, tl.int64) * BM + tl.arange(0, BM)
        tl.store(partials[0] + o_p[:, None] * D + o_d[None, :], b_out, mask=m_out)
        tl.store(partials[1] + o_p, b_lse, mask=m_r)


@triton.jit
def store_rows(
    out, SINK_LOGITS, b_out, b_lse, o_t, o_h, m_r, D: tl.constexpr, DP: tl.constexpr, HAS_SINKS: tl.constexpr
):
    """Final rows: the learned sink takes its share of the softmax, the log-sum-exp is of the keys alone, natural."""
    if HAS_SINKS:
        b_sink = tl.load(SINK_LOGITS + o_h, mask=m_r, other=0.0) * LOG2E
        b_out *= (1 / (1 + tl.exp2(b_sink - b_lse)))[:, None]
    o_d = tl.arange(0, DP)
    p_out = out[0] + (o_t * out[1] + o_h * out[2])[:, None] + o_d[None, :]
    tl.store(p_out, b_out.to(out[0].dtype.element_ty), mask=m_r[:, None] & (o_d[None, :] < D))
    tl.store(out[3] + o_t * out[4] + o_h, b_lse * LN2, mask=m_r)
