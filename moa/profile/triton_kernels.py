"""Triton kernels of the profiling attention: forward, delta, the block sweep with dQ, and dK with dV.

The torch code in `moa.profile.attention` and `moa.profile.sweep` is their reference. Scores are in base 2. A row block
walks its key blocks from the diagonal backwards: blocks that a mask, a span's edge or the rim of the attenuated region
cuts run the masked body, one at a time; all others run in pipelined loops without mask code. Key blocks that no row
sees are never loaded. No atomics anywhere: every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa.profile.sweep import LEAST_MASS as _LEAST_MASS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST_MASS = tl.constexpr(_LEAST_MASS)
FLOAT32_EPS = tl.constexpr(1.1920928955078125e-07)
NO_SPAN = tl.constexpr(1 << 30)  # wider than any text; fills the list of windows up


@triton.jit
def _rows(p_x, start, stride, ROWS: tl.constexpr, DP: tl.constexpr):
    """Pointers [ROWS, DP] to rows from `start` on; 64 bits to the first, 32 from there spare many registers."""
    return p_x + tl.cast(start, tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, DP)[None, :])


@triton.jit
def _load(p_x, start, stride, stop, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a [N, D] matrix as [ROWS, DP]; zeros beyond D and, if MASKED, from row `stop` on."""
    p_rows = _rows(p_x, start, stride, ROWS, DP)
    o_d = tl.arange(0, DP)[None, :]
    if MASKED:
        return tl.load(p_rows, mask=(tl.arange(0, ROWS)[:, None] < stop - start) & (o_d < D), other=0.0)
    elif DP > D:
        return tl.load(p_rows, mask=o_d < D, other=0.0)
    else:
        return tl.load(p_rows)


@triton.jit
def _store(p_x, start, stride, stop, b_x, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    m_rows = (tl.arange(0, ROWS)[:, None] < stop - start) & (tl.arange(0, DP)[None, :] < D)
    tl.store(_rows(p_x, start, stride, ROWS, DP), b_x.to(p_x.dtype.element_ty), mask=m_rows)


@triton.jit
def _scores(b_a, b_b, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 scores of a @ b.T, and what their gradient is multiplied by (of use with a softcap only)."""
    x = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION) * scale
    if SOFTCAP:
        b_tanh = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E / softcap)))
        return b_tanh * (softcap * LOG2E), 1 - b_tanh * b_tanh
    else:
        return x * LOG2E, x


@triton.jit
def _visible(o_m, o_n, N, window):
    """Keys o_n that the rows o_m of the model see: causal, within its own sliding window, inside the text."""
    return (o_n <= o_m) & (o_n > o_m - window) & (o_n < N)


@triton.jit
def _first_block(start, window, BN: tl.constexpr):
    """The lowest key block that a row block from `start` sees."""
    return tl.maximum(start + 1 - window, 0) // BN


@triton.jit
def _next_masked(i_n, first, start, stop, sink, window, lo_first, lo_last, BN: tl.constexpr):
    """The nearest key block at or below `i_n` that needs masks for rows [start, stop); at the latest `first`."""
    bottom = tl.maximum(tl.cdiv(sink, BN), tl.cdiv(tl.maximum(stop - window, 0), BN)) - 1
    result = tl.maximum(first, tl.minimum(i_n, bottom))
    rim = tl.where(i_n >= lo_first // BN, tl.minimum(i_n, tl.cdiv(lo_last, BN) - 1), first)
    is_diagonal = (i_n + 1) * BN - 1 > start
    return tl.where(is_diagonal, i_n, tl.maximum(result, rim))


@triton.jit
def _softmax_step(b_s, b_v, b_max, b_sum, b_acc, PRECISION: tl.constexpr):
    """One step of the online softmax; what rounding P to half precision loses is multiplied too, as D_i is compared with
    sums of exact P."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # no inf - inf in rows that saw nothing yet
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_scale = tl.exp2(b_max - b_safe)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    b_half = b_p.to(b_v.dtype)
    b_acc = tl.dot(b_half, b_v, b_acc * b_scale[:, None], input_precision=PRECISION)
    if b_v.dtype != tl.float32:
        b_acc = tl.dot((b_p - b_half.to(tl.float32)).to(b_v.dtype), b_v, b_acc)
    return b_new, b_sum, b_acc


@triton.jit(do_not_specialize=["N", "lo_stride", "sink", "window"])
def forward_kernel(
    Q, K, V, OUT, LSE, SINK_LOGITS, LO,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    HQ, N, lo_stride, sink, window, scale, softcap, shift,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention output and its natural log-sum-exp. Grid (B * HQ, row blocks), longest rows first."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HQ, i_bh % HQ
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    stop = tl.minimum(N, start + BM)
    p_k, p_v = K + i_b * skb + i_h // G * skh, V + i_b * svb + i_h // G * svh

    o_m = start + tl.arange(0, BM)
    b_q = _load(Q + i_b * sqb + i_h * sqh, start, sqn, stop, BM, D, DP, True)
    p_lo = LO + i_h // G * lo_stride
    b_lo = tl.load(p_lo + o_m, mask=o_m < stop, other=0)
    lo_first, lo_last = tl.load(p_lo + start), tl.load(p_lo + stop - 1)
    # The model's learned sink is one more score, without a value.
    b_max = tl.zeros([BM], tl.float32) + tl.load(SINK_LOGITS + i_h) * LOG2E
    b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)
    b_acc = tl.zeros([BM, DP], tl.float32)

    first = _first_block(start, window, BN)
    i_n = (stop - 1) // BN
    while i_n >= first:
        i_masked = _next_masked(i_n, first, start, stop, sink, window, lo_first, lo_last, BN)
        run_shift = tl.where((i_n + 1) * BN <= lo_first, shift, 0.0)
        for i in range(i_n - i_masked):
            b_k = _load(p_k, (i_n - i) * BN, skn, N, BN, D, DP, False)
            b_v = _load(p_v, (i_n - i) * BN, svn, N, BN, D, DP, False)
            b_s, _ = _scores(b_q, b_k, scale, softcap, SOFTCAP, PRECISION)
            b_max, b_sum, b_acc = _softmax_step(b_s + run_shift, b_v, b_max, b_sum, b_acc, PRECISION)

        begin = i_masked * BN
        o_n = begin + tl.arange(0, BN)
        b_k = _load(p_k, begin, skn, N, BN, D, DP, True)
        b_v = _load(p_v, begin, svn, N, BN, D, DP, True)
        b_s, _ = _scores(b_q, b_k, scale, softcap, SOFTCAP, PRECISION)
        b_s += tl.where((o_n[None, :] >= sink) & (o_n[None, :] < b_lo[:, None]), shift, 0.0)
        b_s = tl.where(_visible(o_m[:, None], o_n[None, :], N, window), b_s, float("-inf"))
        b_max, b_sum, b_acc = _softmax_step(b_s, b_v, b_max, b_sum, b_acc, PRECISION)
        i_n = i_masked - 1

    b_sum = tl.where(o_m < stop, b_sum, 1.0)
    _store(OUT + i_b * sob + i_h * soh, start, son, stop, b_acc / b_sum[:, None], BM, D, DP)
    tl.store(LSE + i_bh * N + o_m, b_max * LN2 + tl.log(b_sum), mask=o_m < stop)


@triton.jit(do_not_specialize=["N"])
def delta_kernel(
    OUT, DO, DELTA, sob, soh, son, sgb, sgh, sgn, HQ, N,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """D_i = dO_i . O_i, which is sum_j P_ij G_ij. Grid (B * HQ, row blocks)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HQ, i_bh % HQ
    start = tl.program_id(1) * BM
    o_m = start + tl.arange(0, BM)
    b_out = _load(OUT + i_b * sob + i_h * soh, start, son, N, BM, D, DP, True).to(tl.float32)
    b_do = _load(DO + i_b * sgb + i_h * sgh, start, sgn, N, BM, D, DP, True).to(tl.float32)
    tl.store(DELTA + i_bh * N + o_m, tl.sum(b_out * b_do, 1), mask=o_m < N)


@triton.jit
def _single_key_effects(b_p, b_dp):
    """|P (G - D)| / (1 - P): what masking each key alone does."""
    return tl.abs(b_dp) / tl.maximum(1 - b_p, FLOAT32_EPS)


@triton.jit(do_not_specialize=["N", "lo_stride", "n_blocks", "sink", "window"])
def sweep_kernel(
    Q, K, V, DO, LSE, DELTA, SINK_LOGITS, LO, WINDOWS, STARTS, DQ, PARTIAL,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdb, sdh, sdn,
    HQ, N, lo_stride, n_blocks, sink, window, scale, softcap, shift,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINT: tl.constexpr, SIGNED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and what the rows of a block lose at every span. Grid (B * HQ, row blocks), longest rows first.

    Rows [STARTS[i], STARTS[i + 1]) are block i. WINDOWS [SP] holds each span less its sinks, ascending. PARTIAL
    [B * HQ, n_blocks, SP] gets, if JOINT, the sum over the rows of sum P (G - D) / sum P over the kept keys, each row's
    without its sign unless SIGNED; else the sum of single-key effects of the keys at distances from a span's window up
    to the next one.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HQ, i_bh % HQ
    i_m = n_blocks - 1 - tl.program_id(1)
    start, stop = tl.load(STARTS + i_m), tl.load(STARTS + i_m + 1)
    p_k, p_v = K + i_b * skb + i_h // G * skh, V + i_b * svb + i_h // G * svh

    o_m = start + tl.arange(0, BM)
    m_m = o_m < stop
    b_q = _load(Q + i_b * sqb + i_h * sqh, start, sqn, stop, BM, D, DP, True)
    b_do = _load(DO + i_b * sgb + i_h * sgh, start, sgn, stop, BM, D, DP, True)
    b_lse = tl.load(LSE + i_bh * N + o_m, mask=m_m, other=float("inf")) * LOG2E  # P = 0 in rows that are not there
    b_delta = tl.load(DELTA + i_bh * N + o_m, mask=m_m, other=0.0)
    p_lo = LO + i_h // G * lo_stride
    b_lo = tl.load(p_lo + o_m, mask=m_m, other=0)
    lo_first, lo_last = tl.load(p_lo + start), tl.load(p_lo + stop - 1)
    o_s = tl.arange(0, SP)
    b_windows = tl.load(WINDOWS + o_s)
    b_losses = tl.zeros([SP], tl.float32)
    b_dq = tl.zeros([BM, DP], tl.float32)

    first = _first_block(start, window, BN)
    # Kept whatever the span: the model's learned sink, and the sink tokens.
    b_mass = tl.exp2(tl.load(SINK_LOGITS + i_h) * LOG2E - b_lse)
    b_change = -b_mass * b_delta
    if JOINT:
        for i_n in range(first, tl.cdiv(tl.minimum(sink, stop), BN)):
            o_n = i_n * BN + tl.arange(0, BN)
            b_k = _load(p_k, i_n * BN, skn, N, BN, D, DP, True)
            b_s, _ = _scores(b_q, b_k, scale, softcap, SOFTCAP, PRECISION)
            m_kept = _visible(o_m[:, None], o_n[None, :], N, window) & (o_n[None, :] < sink)
            b_p = tl.exp2(tl.where(m_kept, b_s, float("-inf")) - b_lse[:, None])
            b_v = _load(p_v, i_n * BN, svn, N, BN, D, DP, True)
            b_g = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_mass += tl.sum(b_p, 1)
            b_change += tl.sum(b_p * (b_g - b_delta[:, None]), 1)

    i_n = (stop - 1) // BN
    while i_n >= first:
        # The nearest window with edges in this block or below.
        next_window = tl.min(tl.where(b_windows >= start - (i_n + 1) * BN + 2, b_windows, NO_SPAN))
        i_edge = tl.cdiv(tl.maximum(stop + 1 - next_window, 0), BN) - 1
        i_masked = _next_masked(i_n, first, start, stop, sink, window, lo_first, lo_last, BN)
        i_masked = tl.maximum(i_masked, tl.minimum(i_n, i_edge))
        run_shift = tl.where((i_n + 1) * BN <= lo_first, shift, 0.0)
        b_effect = tl.zeros([BM], tl.float32)
        for i in range(i_n - i_masked):
            b_k = _load(p_k, (i_n - i) * BN, skn, N, BN, D, DP, False)
            b_v = _load(p_v, (i_n - i) * BN, svn, N, BN, D, DP, False)
            b_s, b_slope = _scores(b_q, b_k, scale, softcap, SOFTCAP, PRECISION)
            b_p = tl.exp2(b_s + run_shift - b_lse[:, None])
            b_g = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_ds = b_p * (b_g - b_delta[:, None])
            if JOINT:
                b_mass += tl.sum(b_p, 1)
                b_change += tl.sum(b_ds, 1)
            else:
                b_effect += tl.sum(_single_key_effects(b_p, b_ds), 1)
            if SOFTCAP:
                b_ds *= b_slope
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        if not JOINT:
            # No window ends inside the run: all its keys lie beyond the same ones.
            i_s = tl.sum((b_windows <= start - (i_n + 1) * BN + 1).to(tl.int32)) - 1
            b_losses += tl.where(o_s == i_s, tl.sum(tl.where(m_m, b_effect, 0.0)), 0.0)

        begin = i_masked * BN
        o_n = begin + tl.arange(0, BN)
        b_k = _load(p_k, begin, skn, N, BN, D, DP, True)
        b_v = _load(p_v, begin, svn, N, BN, D, DP, True)
        b_s, b_slope = _scores(b_q, b_k, scale, softcap, SOFTCAP, PRECISION)
        b_s += tl.where((o_n[None, :] >= sink) & (o_n[None, :] < b_lo[:, None]), shift, 0.0)
        m_seen = _visible(o_m[:, None], o_n[None, :], N, window)
        b_p = tl.exp2(tl.where(m_seen, b_s, float("-inf")) - b_lse[:, None])
        b_g = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_change_here = b_p * (b_g - b_delta[:, None])
        b_ds = b_change_here * b_slope if SOFTCAP else b_change_here
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)

        m_free = m_seen & (o_n[None, :] >= sink)  # the keys that a span can drop
        b_distance = o_m[:, None] - o_n[None, :]
        s_begin = tl.sum((b_windows < start - begin - BN + 2).to(tl.int32))
        s_end = tl.sum((b_windows <= stop - begin).to(tl.int32))
        if JOINT:
            b_p = tl.where(m_free, b_p, 0.0)
            b_change_here = tl.where(m_free, b_change_here, 0.0)
            for i_s in range(s_begin, s_end):
                width = tl.load(WINDOWS + i_s)
                m_kept = b_distance < width
                b_kept = b_mass + tl.sum(tl.where(m_kept, b_p, 0.0), 1)
                b_kept_change = b_change + tl.sum(tl.where(m_kept, b_change_here, 0.0), 1)
                b_edge = o_m + 1 - width
                # Each row's edge lies in one block; where nothing lies before it the span covers the row: exactly 0.
                m_here = m_m & (b_edge >= begin) & (b_edge < begin + BN)
                m_here &= b_edge > tl.maximum(sink, o_m + 1 - window)
                b_loss = tl.where(b_kept > LEAST_MASS, b_kept_change / tl.maximum(b_kept, LEAST_MASS), -b_delta)
                if not SIGNED:
                    b_loss = tl.abs(b_loss)
                b_losses += tl.where(o_s == i_s, tl.sum(tl.where(m_here, b_loss, 0.0)), 0.0)
            b_mass += tl.sum(b_p, 1)
            b_change += tl.sum(b_change_here, 1)
        else:
            b_effects = tl.where(m_free & m_m[:, None], _single_key_effects(b_p, b_change_here), 0.0)
            for i_s in range(tl.maximum(s_begin - 1, 0), s_end):
                width = tl.load(WINDOWS + i_s)
                next_width = tl.load(WINDOWS + i_s + 1, mask=i_s + 1 < SP, other=NO_SPAN)
                m_between = (b_distance >= width) & (b_distance < next_width)
                b_losses += tl.where(o_s == i_s, tl.sum(tl.where(m_between, b_effects, 0.0)), 0.0)
        i_n = i_masked - 1

    tl.store(PARTIAL + (i_bh * n_blocks + i_m) * SP + o_s, b_losses)
    _store(DQ + i_b * sdb + i_h * sdh, start, sdn, stop, b_dq * scale, BM, D, DP)


@triton.jit(do_not_specialize=["N", "lo_stride", "sink", "window"])
def key_value_kernel(
    Q, K, V, DO, LSE, DELTA, LO, RIMS, DK, DV,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sxb, sxh, sxn, syb, syh, syn,
    HQ, N, lo_stride, sink, window, scale, softcap, shift,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a key block, summed over the query heads of its KV head. Grid (B * HKV, key blocks).

    RIMS [HKV, key blocks, 2] holds the first row that attenuates some key of a block, and the first that attenuates all.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // (HQ // G), i_bh % (HQ // G)
    begin = tl.program_id(1) * BN
    o_n = begin + tl.arange(0, BN)
    b_k = _load(K + i_b * skb + i_h * skh, begin, skn, N, BN, D, DP, True)
    b_v = _load(V + i_b * svb + i_h * svh, begin, svn, N, BN, D, DP, True)
    b_dk = tl.zeros([BN, DP], tl.float32)
    b_dv = tl.zeros([BN, DP], tl.float32)

    # Row blocks in three pairs of a masked and a plain run: [cut0, cut1) diagonal, to cut2 as they are, to cut3 the
    # rim, to cut4 attenuated, to cut5 the end of the model's own window.
    cut0 = begin // BM
    cut5 = tl.minimum(tl.cdiv(N, BM), tl.cdiv(begin + BN - 1 + window, BM))
    full = tl.minimum((begin + window) // BM, cut5)
    cut1 = tl.minimum(tl.cdiv(begin + BN - 1, BM), cut5)
    p_rims = RIMS + (i_h * tl.num_programs(1) + tl.program_id(1)) * 2
    cut2 = tl.maximum(cut1, tl.minimum(tl.load(p_rims) // BM, full))
    cut3 = tl.maximum(cut2, tl.minimum(tl.cdiv(tl.load(p_rims + 1), BM), full))
    cut4 = tl.maximum(cut3, full)
    for i in range(3 * G):
        i_run, i_q = i % 3, i_h * G + i // 3
        p_q, p_do = Q + i_b * sqb + i_q * sqh, DO + i_b * sgb + i_q * sgh
        p_lse, p_delta = LSE + (i_b * HQ + i_q) * N, DELTA + (i_b * HQ + i_q) * N
        masked_from = tl.where(i_run == 0, cut0, tl.where(i_run == 1, cut2, cut4))
        plain_from = tl.where(i_run == 0, cut1, tl.where(i_run == 1, cut3, cut5))
        plain_to = tl.where(i_run == 0, cut2, tl.where(i_run == 1, cut4, cut5))
        run_shift = tl.where(i_run == 1, shift, 0.0)
        for i_m in range(masked_from, plain_from):
            o_m = i_m * BM + tl.arange(0, BM)
            b_q = _load(p_q, i_m * BM, sqn, N, BM, D, DP, True)
            b_do = _load(p_do, i_m * BM, sgn, N, BM, D, DP, True)
            b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=float("inf")) * LOG2E
            b_delta = tl.load(p_delta + o_m, mask=o_m < N, other=0.0)
            b_lo = tl.load(LO + i_h * lo_stride + o_m, mask=o_m < N, other=0)
            b_s, b_slope = _scores(b_k, b_q, scale, softcap, SOFTCAP, PRECISION)  # [BN, BM]
            b_s += tl.where((o_n[:, None] >= sink) & (o_n[:, None] < b_lo[None, :]), shift, 0.0)
            m_seen = _visible(o_m[None, :], o_n[:, None], N, window)
            b_p = tl.exp2(tl.where(m_seen, b_s, float("-inf")) - b_lse[None, :])
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_g = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = b_p * (b_g - b_delta[None, :])
            if SOFTCAP:
                b_ds *= b_slope
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        for i_m in range(plain_from, plain_to):
            o_m = i_m * BM + tl.arange(0, BM)
            b_q = _load(p_q, i_m * BM, sqn, N, BM, D, DP, True)
            b_do = _load(p_do, i_m * BM, sgn, N, BM, D, DP, True)
            b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=float("inf")) * LOG2E
            b_delta = tl.load(p_delta + o_m, mask=o_m < N, other=0.0)
            b_s, b_slope = _scores(b_k, b_q, scale, softcap, SOFTCAP, PRECISION)
            b_p = tl.exp2(b_s + run_shift - b_lse[None, :])
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_g = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = b_p * (b_g - b_delta[None, :])
            if SOFTCAP:
                b_ds *= b_slope
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    _store(DK + i_b * sxb + i_h * sxh, begin, sxn, N, b_dk * scale, BN, D, DP)
    _store(DV + i_b * syb + i_h * syh, begin, syn, N, b_dv, BN, D, DP)
