"""Writes the keys and values of a step that later queries can need into their pages, quantised where pages are.

`moa.kernels.paged.quantise` is the reference of the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa.kernels.paged.quantise import LEAST_SCALE as _LEAST_SCALE
from moa.kernels.paged.units import UNIT_TOKENS as PAGE
from moa.kernels.paged.units import window_start

LEAST_SCALE = tl.constexpr(_LEAST_SCALE)
ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away, it leaves a float32 rounded


@triton.jit
def _rounded(b_x):
    """To the nearest whole number, ties to even, of numbers below 2**22."""
    return (b_x + ROUND) - ROUND


@triton.jit
def _rounded_e4m3(b_x):
    """To the nearest number that E4M3 has: 3 bits behind the first, the least exponent -6. Then a cast loses nothing, and
    is the same wherever kernels run: Triton's interpreter drops a carry where it rounds by itself."""
    b_exponent = tl.maximum((b_x.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
    b_step = ((b_exponent - 3) << 23).to(tl.float32, bitcast=True)
    b_inverse = ((257 - b_exponent) << 23).to(tl.float32, bitcast=True)
    return _rounded(b_x * b_inverse) * b_step


@triton.jit
def _quantise(b_x, MOST: tl.constexpr, FLOAT: tl.constexpr):
    """Codes of rows, and what they are multiplied by: their largest number over MOST; NaN where a number is not finite."""
    b_x = b_x.to(tl.float32)
    b_scale = tl.maximum(tl.max(tl.abs(b_x), 1) / MOST, LEAST_SCALE)
    b_codes = b_x / b_scale[:, None]
    b_scale += tl.sum(b_x * 0.0, 1)
    if FLOAT:
        return _rounded_e4m3(b_codes).to(tl.float8e4nv), b_scale
    else:
        return _rounded(b_codes).to(tl.int8), b_scale


@triton.jit
def _append(p_x, stride, POOL, CODES, SCALES, o_t, o_row, m_plain, m_coded, D: tl.constexpr, DP: tl.constexpr, QUANT: tl.constexpr, FLOAT: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    o_d = tl.arange(0, DP)[None, :]
    m_d = o_d < D
    b_x = tl.load(p_x + o_t.to(tl.int64)[:, None] * stride + o_d, mask=(m_plain | m_coded)[:, None] & m_d, other=0.0)
    tl.store(POOL + o_row[:, None] * D + o_d, b_x, mask=m_plain[:, None] & m_d)
    if QUANT:
        b_codes, b_scale = _quantise(b_x, MOST, FLOAT)
        tl.store(CODES + o_row[:, None] * D + o_d, b_codes, mask=m_coded[:, None] & m_d)
        tl.store(SCALES + o_row, b_scale, mask=m_coded)


@triton.jit(do_not_specialize=["sth", "sts", "layer_head", "sink", "least"])
def append_kernel(
    K, V, POOL_K, POOL_V, CODES_K, CODES_V, SCALES_K, SCALES_V, TABLE, SLICES, PINNED, RULES, RULE_OF_HEAD, BLOCKS,
    skt, skh, svt, svh, sts, sth, layer_head, sink, least,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, QUANT: tl.constexpr, FLOAT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, KV heads). BLOCKS int32 [blocks, 2] holds a slice and the first of up to BT of its tokens.

    A token survives that is a sink, or in the window of its slice's last token. Pages of the sinks are never quantised.
    """
    i_s, first = tl.load(BLOCKS + tl.program_id(0) * 2), tl.load(BLOCKS + tl.program_id(0) * 2 + 1)
    i_h = tl.program_id(1).to(tl.int64)
    head = layer_head + i_h
    p_slice = SLICES + i_s.to(tl.int64) * 4
    offset, tokens, position = tl.load(p_slice), tl.load(p_slice + 1), tl.load(p_slice + 2)
    p_rule = RULES + tl.load(RULE_OF_HEAD + head) * 3
    alpha, beta, native = tl.load(p_rule), tl.load(p_rule + 1), tl.load(p_rule + 2)
    low = window_start(position + tokens - 1, tl.load(PINNED + i_s), alpha, beta, native, sink, least).to(tl.int32)
    if (position + first < sink) | (position + first + BT > low):
        o_t = first + tl.arange(0, BT)
        b_j = position + o_t
        m_t = (o_t < tokens) & ((b_j < sink) | (b_j >= low))
        p_table = TABLE + tl.load(p_slice + 3).to(tl.int64) * sts + head * sth
        o_row = tl.load(p_table + b_j // PAGE, mask=m_t, other=0).to(tl.int64) * PAGE + b_j % PAGE
        m_plain = m_t
        if QUANT:
            m_plain = m_t & (b_j // PAGE < tl.cdiv(sink, PAGE))
        m_coded = m_t & (b_j // PAGE >= tl.cdiv(sink, PAGE))
        o_t += offset
        _append(K + i_h * skh, skt, POOL_K, CODES_K, SCALES_K, o_t, o_row, m_plain, m_coded, D, DP, QUANT, FLOAT, MOST)
        _append(V + i_h * svh, svt, POOL_V, CODES_V, SCALES_V, o_t, o_row, m_plain, m_coded, D, DP, QUANT, FLOAT, MOST)
