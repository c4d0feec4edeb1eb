"""Prefill tiles and splits of decodes in one launch, so that the ones' arithmetic and the others' memory traffic overlap.

After POD-Attention (Kamath et al. 2024). Every program runs one entry of either list through the same tile as separate
launches do, so results are theirs bit for bit. Two ways to say which: by the program's place in the grid, decodes spread
evenly among prefill tiles; or by tickets that each multiprocessor draws, so that both kinds share every one of them
whatever order programs start in.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import smid

from moa.kernels.paged.attend_kernel import LENGTHS, attend_entry


@triton.jit
def _spread(i, n_decode, total, phase, phases):
    """Of `total` places, of which `n_decode` are spread evenly: how many come before place i, and whether it is one.

    `phase / phases` of a gap brings them forward, so that not all multiprocessors begin alike.
    """
    start, step = tl.cast(phase, tl.int64) * total, tl.cast(n_decode, tl.int64) * phases
    before = (i * step + start) // (total * phases)
    return before, (i * step + step + start) // (total * phases) > before


@triton.jit
def choose(pid, n_prefill, n_decode):
    """Which entry of which list the program `pid` runs: (index, whether it is a decode, whether there is one)."""
    total = n_prefill + n_decode
    before, is_decode = _spread(pid, n_decode, tl.maximum(total, 1), 0, 1)
    return tl.where(is_decode, before, pid - before), is_decode, pid < total


@triton.jit
def draw(sm, n_sms, TICKETS, n_prefill, n_decode):
    """As `choose`, by the tickets of a multiprocessor: TICKETS int32 counts the prefill tiles taken, the decodes taken, and
    then the programs that each multiprocessor has started. A program that finds one list used up takes from the other, so
    as many programs as entries run them all."""
    ticket = tl.atomic_add(TICKETS + 2 + sm, 1)
    _, wants = _spread(ticket, n_decode, tl.maximum(n_prefill + n_decode, 1), sm, n_sms)
    is_decode = wants.to(tl.int32)
    index = tl.atomic_add(TICKETS + is_decode, 1)
    if index >= tl.where(is_decode == 1, n_decode, n_prefill):
        is_decode = 1 - is_decode
        index = tl.atomic_add(TICKETS + is_decode, 1)
    return index, is_decode == 1, index < tl.where(is_decode == 1, n_decode, n_prefill)


# Where a layer's counters begin is any multiple of 4 bytes.
@triton.jit(
    do_not_specialize=[*LENGTHS, "n_prefill", "n_sms"], do_not_specialize_on_alignment=["LIVE", "TICKETS", "SM_OF"]
)
def hybrid_kernel(
    Q, K, V, OUT, LSE, POOL_K, POOL_V, CODES_K, CODES_V, SCALES_K, SCALES_V, TABLE, SLICES, PINNED, RULES, RULE_OF_HEAD,
    SINK_LOGITS, PREFILL, DECODE, PARTIAL, PARTIAL_LSE, LIVE, TICKETS, SM_OF, n_prefill, n_sms,
    sqt, sqh, skt, skh, svt, svh, sot, soh, slt, sts, sth, layer_head, sink, least, factor, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DECODE_BM: tl.constexpr,
    DECODE_BN: tl.constexpr, QUANT: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BY_TICKET: tl.constexpr, TOLD_SM: tl.constexpr,
):  # fmt: skip
    """One program per entry of PREFILL and of DECODE, both int32 [entries, 8]; of the latter the first LIVE [1] count.

    BY_TICKET has multiprocessors draw tickets from TICKETS int32 [2 + n_sms], all 0 at the start; with TOLD_SM the
    number of a program's multiprocessor is read from SM_OF int32 [programs], as where kernels are interpreted. Prefill
    tiles are whole. What the other arguments are, `attend_kernel` says.
    """
    pid = tl.program_id(0)
    n_decode = tl.load(LIVE)
    if BY_TICKET:
        sm = tl.load(SM_OF + pid) if TOLD_SM else smid()
        index, is_decode, is_there = draw(sm, n_sms, TICKETS, n_prefill, n_decode)
    else:
        index, is_decode, is_there = choose(pid, n_prefill, n_decode)
    if is_there & is_decode:
        attend_entry(
            Q, K, V, OUT, LSE, POOL_K, POOL_V, CODES_K, CODES_V, SCALES_K, SCALES_V, TABLE, SLICES, PINNED, RULES,
            RULE_OF_HEAD, SINK_LOGITS, DECODE + index * 8, PARTIAL, PARTIAL_LSE,
            sqt, sqh, skt, skh, svt, svh, sot, soh, slt, sts, sth, layer_head, sink, least, factor, cap,
            G, D, DP, DECODE_BM, DECODE_BN, QUANT, True, SOFTCAP, HAS_SINKS, UPCAST, PRECISION,
        )  # fmt: skip
    elif is_there:
        attend_entry(
            Q, K, V, OUT, LSE, POOL_K, POOL_V, CODES_K, CODES_V, SCALES_K, SCALES_V, TABLE, SLICES, PINNED, RULES,
            RULE_OF_HEAD, SINK_LOGITS, PREFILL + index * 8, PARTIAL, PARTIAL_LSE,
            sqt, sqh, skt, skh, svt, svh, sot, soh, slt, sts, sth, layer_head, sink, least, factor, cap,
            G, D, DP, BM, BN, QUANT, False, SOFTCAP, HAS_SINKS, UPCAST, PRECISION,
        )  # fmt: skip
