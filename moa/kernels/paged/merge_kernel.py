"""Joins the results of splits by their log-sum-exp; `moa.kernels.paged.merge.merge_partials` is its reference."""

from __future__ import annotations

import triton
import triton.language as tl

from moa.kernels.paged.tile import store_rows


@triton.jit
def merge_kernel(
    OUT, LSE, PARTIAL, PARTIAL_LSE, SLICES, ITEMS, SINK_LOGITS, sot, soh, slt,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One program per item; ITEMS int32 [items, 8], columns as in `moa.kernels.paged.splits.Item`.

    An item of one split has been written by it; one of several has its partial results from its slot on.
    """
    p_item = ITEMS + tl.program_id(0) * 8
    count = tl.load(p_item + 7)
    if count > 1:
        offset = tl.load(SLICES + tl.load(p_item).to(tl.int64) * 4)
        head, row_from, slot = tl.load(p_item + 1), tl.load(p_item + 2), tl.load(p_item + 6).to(tl.int64)
        m_r = tl.arange(0, BM) < tl.load(p_item + 3)
        o_d = tl.arange(0, DP)
        o_p = slot * BM + tl.arange(0, BM)
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, DP], tl.float32)
        for _ in range(count):
            b_lse = tl.load(PARTIAL_LSE + o_p, mask=m_r, other=float("-inf"))
            b_part = tl.load(
                PARTIAL + o_p[:, None] * D + o_d[None, :], mask=m_r[:, None] & (o_d[None, :] < D), other=0.0
            )
            b_new = tl.maximum(b_max, b_lse)
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # no inf - inf in rows that saw nothing yet
            b_shrink, b_weight = tl.exp2(b_max - b_safe), tl.exp2(b_lse - b_safe)
            b_sum = b_sum * b_shrink + b_weight
            b_acc = b_acc * b_shrink[:, None] + b_part * b_weight[:, None]
            b_max = b_new
            o_p += BM
        b_some = tl.where(b_sum == 0, 1.0, b_sum)
        b_lse = tl.where(b_sum == 0, float("-inf"), b_max + tl.log2(b_some))
        o_r = row_from + tl.arange(0, BM)
        out = OUT, sot, soh, LSE, slt
        o_t, o_h = (offset + o_r // G).to(tl.int64), head * G + o_r % G
        store_rows(out, SINK_LOGITS, b_acc / b_some[:, None], b_lse, o_t, o_h, m_r, D, DP, HAS_SINKS)
