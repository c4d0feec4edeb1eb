"""Whether a kernel is right, asked before it is timed: some rows at full size, and every row at small ones, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from moa.eval.gpu.cases import Case, KVFormat, Part
from moa.eval.gpu.inputs import Inputs, PartData
from moa.eval.gpu.patterns import Pattern, small
from moa.eval.gpu.work import Mask
from moa.kernels.reference import reference_attention
from moa.spans import Int64Array

# Worst relative error of a row's output, ||out - ref|| / ||ref||. bfloat16 weights and outputs give 0.3 %; one key lost
# of the n random ones that a row sees gives 1 / sqrt(n), 3 % at 1,000. Eight-bit keys move scores by a few per cent.
TOLERANCE: dict[KVFormat, float] = {"bf16": 0.012, "int8": 0.03, "fp8": 0.08}
FLOAT32_TOLERANCE = 1e-4
# Rows looked at in one part of a case at full size, beside its first and last ones.
ROWS = 8


def tolerance(kv: KVFormat, dtype: torch.dtype) -> float:
    """The error from which on a kernel is wrong."""
    return FLOAT32_TOLERANCE if dtype == torch.float32 and kv == "bf16" else TOLERANCE[kv]


def small_cases(case: Case) -> list[Case]:
    """Cases like `case` whose every row can be compared: odd lengths, windows that move, a chunk that is no block."""
    pattern, heads = small(case.heads), case.heads
    if case.kind == "prefill":
        return [Case("prefill", heads, pattern, n, 2) for n in (129, 777)]
    if case.kind == "chunk":
        return [Case("chunk", heads, pattern, n, 2, chunk) for n, chunk in ((300, 65), (1001, 257))]
    if case.kind == "decode":
        return [Case("decode", heads, pattern, n, 3, kv=case.kv) for n in (65, 1001)]
    return [Case("hybrid", heads, pattern, 700, 3, 130, case.kv, prompts=2)]


def sampled_rows(part: Part) -> list[int]:
    """New tokens of a part to look at: first, last, about block edges, and some between."""
    edges = {0, 1, 63, 64, 127, part.new // 2, part.new - 65, part.new - 1}
    drawn = np.random.default_rng(part.cached + part.new).integers(0, part.new, ROWS)
    return sorted({int(i) for i in (*edges, *drawn) if 0 <= i < part.new})


def window_starts(pattern: Pattern, layer: int, part: Part, mask: Mask, rows: Sequence[int]) -> Int64Array:
    """First key of each row's window under a mask: int64 [HKV, R]. Sinks are seen besides only under "same"."""
    positions, length = part.cached + np.array(rows, dtype=np.int64), part.cached + part.new
    if mask == "same":
        mine: Int64Array = pattern.rules.window_start(positions, length)[layer]
        return mine
    start = np.zeros_like(positions) if mask == "dense" else positions + 1 - pattern.mean_span(length)
    return np.broadcast_to(np.maximum(start, 0), (pattern.rules.alpha.shape[1], len(rows)))


def worst_error(case: Case, inputs: Inputs, outputs: Sequence[torch.Tensor], mask: Mask, every_row: bool) -> float:
    """The largest relative error of any row looked at; infinity where an output is not a number.

    Args:
        case: the case.
        inputs: what was attended over.
        outputs: per part [S, C, HQ, D].
        mask: what was to be computed.
        every_row: of every sequence; else some rows of the first and the last sequence.
    """
    worst = 0.0
    for data, out in zip(inputs.parts, outputs, strict=True):
        rows = list(range(data.part.new)) if every_row else sampled_rows(data.part)
        sequences = range(data.part.sequences) if every_row else {0, data.part.sequences - 1}
        starts = window_starts(case.pattern, inputs.layer, data.part, mask, rows)
        sinks = case.pattern.rules.sink_tokens if mask == "same" else 0
        for s in sequences:
            worst = max(worst, _sequence_error(data, out[s, rows], s, rows, starts, sinks))
    return worst


def _sequence_error(
    data: PartData, out: torch.Tensor, s: int, rows: Sequence[int], starts: Int64Array, sinks: int
) -> float:
    """Of one sequence's `rows`, `out` [R, HQ, D]; one KV head at a time, for float64 copies of long keys are large."""
    device, heads = data.q.device, data.k.shape[1]
    positions = torch.tensor([data.part.cached + row for row in rows], device=device)  # [R]
    lows = torch.tensor(starts, device=device)  # [HKV, R]
    q, group, worst = data.q[s, rows], data.q.shape[2] // heads, 0.0
    for h in range(heads):
        mine = slice(h * group, (h + 1) * group)
        keys, values = (x[s, h, :, None].double() for x in (data.k, data.v))  # [N, 1, D]
        wanted, _ = reference_attention(q[:, mine].double(), keys, values, positions, lows[h : h + 1], sinks)
        worst = max(worst, relative_error(out[:, mine], wanted))
    return worst


def relative_error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Worst row of ||out - wanted|| / ||wanted|| over the last axis; infinity where `out` is not finite."""
    error = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    found = float(error.max())
    return found if math.isfinite(found) else math.inf


def describe(case: Case, error: float, limit: float) -> str:
    """Why a kernel is not timed."""
    return f"{case.name}: worst row is off by {error:.3g}, allowed {limit:g}"
