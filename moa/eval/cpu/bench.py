"""Times of the torch backend's kernels on a CPU beside dense attention and flex_attention, in turns within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moa import process_memory
from moa.eval.cpu.cases import DENSE, Case, Subject, cases, subjects
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend
from moa.kernels.memory import TorchMemory
from moa.spans import SpanRules

Times = tuple[float, float]
Quantiles = tuple[float | None, float | None, float | None]
GROWTH_SPAN = 2048
# A decode takes microseconds: so many turns cost nothing beside a prefill.
DECODE_TURNS = 12


@dataclass(frozen=True, slots=True)
class Row:
    """One subject in one case: CPU seconds of all threads, which other load on the machine hardly changes, and wall seconds.

    Times are those of one layer. Quantiles are over turns, those of ratios over the ratios of dense over it within each turn.
    """

    kind: str
    tokens: int
    dtype: str
    head_dim: int
    query_heads: int
    kv_heads: int
    subject: str
    plan: str
    pairs_ratio: float
    path: str
    turns: int
    wall_s: float | None
    median_s: float | None
    low_s: float | None
    high_s: float | None
    dense_over_it: float | None
    dense_over_it_low: float | None
    dense_over_it_high: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Growth:
    """A prefill of `tokens` with a span that stands still: least CPU seconds, and peak memory over what q, k, v take."""

    tokens: int
    seconds: float
    peak_bytes: int


def bench_cpu(tokens: int, turns: int, progress: Callable[[str, int, int], None]) -> tuple[list[Row], list[Growth]]:
    """Measure the grid at one length, and how cost grows up to four times the length.

    Raises:
        ResourceError: not on Linux, whose /proc tells a process's peak memory.
    """
    lengths = (tokens, 2 * tokens, 4 * tokens)
    grown, grid, rows = [], list(cases(tokens)), []
    for done, n in enumerate(lengths, 1):
        grown.append(_growth(n))
        progress("long prefills", done, len(lengths))
    for done, case in enumerate(grid, 1):
        rows += list(_measure(case, turns if case.kind == "prefill" else DECODE_TURNS * turns))
        progress("kernels", done, len(grid))
    return rows, grown


def _measure(case: Case, turns: int) -> Iterator[Row]:
    times: dict[Subject, list[Times]] = {}
    for subject in subjects(case):
        try:
            subject.call()
        except RuntimeError as error:  # a peer that does not compile is a row that says why, not the end of a long run
            yield _row(case, subject, [], None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            times[subject] = []
    for _ in range(turns):
        for subject, mine in times.items():
            mine.append(_timed(subject.call))
    dense = next(([cpu for cpu, _ in mine] for subject, mine in times.items() if subject.name == DENSE), None)
    for subject, mine in times.items():
        yield _row(case, subject, mine, None if subject.name == DENSE else dense)


def _timed(call: Callable[[], object]) -> Times:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def _row(case: Case, subject: Subject, times: Sequence[Times], dense: Sequence[float] | None, reason: str = "") -> Row:
    heads = case.kv_heads * case.group
    where = (case.kind, case.tokens, case.dtype, case.head_dim, heads, case.kv_heads)
    cpu, wall = [cpu / case.layers for cpu, _ in times], [wall / case.layers for _, wall in times]
    ratios = [] if dense is None else [a / case.layers / b for a, b in zip(dense, cpu, strict=True)]
    figures = (_quantiles(wall)[0], *_quantiles(cpu), *_quantiles(ratios))
    return Row(*where, subject.name, subject.plan, subject.pairs_ratio, subject.path(), len(times), *figures, reason)


def _quantiles(values: Sequence[float]) -> Quantiles:
    """Median, and the quantiles at 20 and 80 %."""
    if not values:
        return None, None, None
    middle, low, high = (float(x) for x in np.quantile(values, (0.5, 0.2, 0.8)))
    return middle, low, high


def _growth(tokens: int) -> Growth:
    """Prefill of one head of 64 in float32 under a span of GROWTH_SPAN tokens."""
    ones = np.ones((1, 1), dtype=np.int64)
    rules = SpanRules(GROWTH_SPAN * ones, 0 * ones, 64, 128)
    q, k, v = torch.randn(3, tokens, 1, 64).unbind(0)

    def call() -> None:
        with TorchMemory(rules) as kv:
            kv.add(0)
            attend(q, k, v, kv, 0, Batch.pack([(0, tokens, 0)]))

    call()
    process_memory.give_back()
    process_memory.reset_peak()
    base = process_memory.held_bytes()
    seconds = min(_timed(call)[0] for _ in range(3))
    return Growth(tokens, seconds, process_memory.peak_bytes() - base)
