"""Attention over a work list: prefill tiles, decodes and splits of decodes all run this kernel, with other tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from moa.kernels.paged.tile import attend_tile

LENGTHS = ["sth", "sts", "layer_head", "sink", "least"]


@triton.jit
def attend_entry(
    Q, K, V, OUT, LSE, POOL_K, POOL_V, CODES_K, CODES_V, SCALES_K, SCALES_V, TABLE, SLICES, PINNED, RULES, RULE_OF_HEAD,
    SINK_LOGITS, p_work, PARTIAL, PARTIAL_LSE,
    sqt, sqh, skt, skh, svt, svh, sot, soh, slt, sts, sth, layer_head, sink, least, factor, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QUANT: tl.constexpr,
    SHORT: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The entry of a work list at `p_work`; `attend_kernel` says what the other arguments are."""
    unit_from, unit_to = tl.load(p_work + 4), tl.load(p_work + 5)
    if unit_to > unit_from:
        i_s, i_h = tl.load(p_work).to(tl.int64), tl.load(p_work + 1).to(tl.int64)
        p_slice = SLICES + i_s * 4
        offset, position, i_slot = tl.load(p_slice), tl.load(p_slice + 2), tl.load(p_slice + 3).to(tl.int64)
        head = layer_head + i_h
        item = offset, position, i_h, tl.load(p_work + 2), tl.load(p_work + 3), unit_from, unit_to, tl.load(p_work + 6)
        o_t = offset.to(tl.int64)
        fresh = K + o_t * skt + i_h * skh, V + o_t * svt + i_h * svh, skt, svt
        pool = POOL_K, POOL_V, TABLE + i_slot * sts + head * sth
        codes = CODES_K, CODES_V, SCALES_K, SCALES_V
        spans = tl.load(PINNED + i_s), RULES + tl.load(RULE_OF_HEAD + head) * 3, sink, least
        attend_tile(
            (Q, sqt, sqh), (OUT, sot, soh, LSE, slt), fresh, pool, codes, item, spans, (PARTIAL, PARTIAL_LSE), SINK_LOGITS,
            factor, cap, G, D, DP, BM, BN, QUANT, SHORT, SOFTCAP, HAS_SINKS, UPCAST, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    Q, K, V, OUT, LSE, POOL_K, POOL_V, CODES_K, CODES_V, SCALES_K, SCALES_V, TABLE, SLICES, PINNED, RULES, RULE_OF_HEAD,
    SINK_LOGITS, WORK, PARTIAL, PARTIAL_LSE,
    sqt, sqh, skt, skh, svt, svh, sot, soh, slt, sts, sth, layer_head, sink, least, factor, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QUANT: tl.constexpr,
    SHORT: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per entry of WORK; an entry with no units is padding. `attend_tile` says what the arguments are.

    SLICES int32 [S, 4] holds offset, tokens, position and row of the page table, PINNED int64 [S] the pinned length or 0.
    TABLE int32 [slots, L * HKV, pages] has the strides `sts` and `sth`, RULES int64 [R, 3] alpha, beta in 1/65536 and the
    native window, RULE_OF_HEAD int32 [L * HKV] their rows; the layer's heads begin at `layer_head`. An entry with
    slot -1 writes OUT and LSE, others their slot of PARTIAL and PARTIAL_LSE. WORK is int32 [entries, 8], columns as in
    `moa.kernels.paged.splits.Item`.
    """
    attend_entry(
        Q, K, V, OUT, LSE, POOL_K, POOL_V, CODES_K, CODES_V, SCALES_K, SCALES_V, TABLE, SLICES, PINNED, RULES,
        RULE_OF_HEAD, SINK_LOGITS, WORK + tl.program_id(0) * 8, PARTIAL, PARTIAL_LSE,
        sqt, sqh, skt, skh, svt, svh, sot, soh, slt, sts, sth, layer_head, sink, least, factor, cap,
        G, D, DP, BM, BN, QUANT, SHORT, SOFTCAP, HAS_SINKS, UPCAST, PRECISION,
    )  # fmt: skip
