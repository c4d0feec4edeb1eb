"""What `moa bench serve` measured, held against its targets: ratios within a turn, medians over turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from moa.eval.serving.bench_serve import Results
from moa.eval.serving.rows import EQUAL
from moa.eval.serving.subjects import ORCA, PREFILL_FIRST, SARATHI

MOST_TBT_RATIO, THROUGHPUT_WITHIN, LEAST_CAPACITY_RATIO = 1 / 5, 0.05, 2.6


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target on one model, the median figure and those of all turns."""

    model: str
    target: str
    figure: float
    turns: tuple[float, ...]
    is_met: bool


def verdicts(results: Results) -> Iterator[Verdict]:
    """All targets that the results say something about."""
    for model in results.setups:
        yield from _tail(results, model)
        for other in (PREFILL_FIRST, ORCA):
            yield from _capacity(results, model, other)


def _tail(results: Results, model: str) -> Iterator[Verdict]:
    rows = {(r.subject, r.turn): r for r in results.rows if (r.model, r.stage) == (model, EQUAL)}
    pairs = [(rows[SARATHI, t], rows[PREFILL_FIRST, t]) for s, t in rows if s == SARATHI and (PREFILL_FIRST, t) in rows]
    tails = [a.tbt_p99_ms / b.tbt_p99_ms for a, b in pairs if a.tbt_p99_ms and b.tbt_p99_ms]
    if not tails:
        return
    target = f"P99 time between tokens, {SARATHI} / {PREFILL_FIRST}: at most {MOST_TBT_RATIO:.2f}"
    yield _verdict(model, target, tails, statistics.median(tails) <= MOST_TBT_RATIO)
    outputs = [a.output_tokens_per_s / b.output_tokens_per_s for a, b in pairs]
    target = f"output tokens per second there, {SARATHI} / {PREFILL_FIRST}: 1 ± {THROUGHPUT_WITHIN:.2f}"
    yield _verdict(model, target, outputs, abs(statistics.median(outputs) - 1) <= THROUGHPUT_WITHIN)


def _capacity(results: Results, model: str, other: str) -> Iterator[Verdict]:
    found = {(f.subject, f.turn): f.capacity for f in results.found if f.model == model}
    pairs = [(found[SARATHI, t], found[other, t]) for s, t in found if s == SARATHI and (other, t) in found]
    ratios = [ours.holds / theirs.holds for ours, theirs in pairs if theirs.holds]
    if ratios:
        target = f"capacity, {SARATHI} / {other}: at least {LEAST_CAPACITY_RATIO}"
        yield _verdict(model, target, ratios, statistics.median(ratios) >= LEAST_CAPACITY_RATIO)


def _verdict(model: str, target: str, figures: list[float], is_met: bool) -> Verdict:
    return Verdict(model, target, statistics.median(figures), tuple(figures), is_met)
