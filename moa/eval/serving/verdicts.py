"""What `moa bench serve` measured, held against its targets: ratios within a turn, medians over turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from moa.eval.markdown import table
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

    @classmethod
    def of(cls, model: str, target: str, figures: Sequence[float], is_met: Callable[[float], bool]) -> Self:
        """The verdict on the median of some turns."""
        median = float(statistics.median(figures))
        return cls(model, target, median, tuple(figures), is_met(median))


def verdict_table(found: Sequence[Verdict]) -> str:
    """Targets in Markdown."""
    rows = [
        (v.model, v.target, f"{v.figure:.2f}", ", ".join(f"{x:.2f}" for x in v.turns), "met" if v.is_met else "missed")
        for v in found
    ]
    return (
        table(("model", "target", "median", "turns", ""), rows) if rows else "None: what they compare was not measured."
    )


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
    yield Verdict.of(model, target, tails, lambda ratio: ratio <= MOST_TBT_RATIO)
    outputs = [a.output_tokens_per_s / b.output_tokens_per_s for a, b in pairs]
    target = f"output tokens per second there, {SARATHI} / {PREFILL_FIRST}: 1 ± {THROUGHPUT_WITHIN:.2f}"
    yield Verdict.of(model, target, outputs, lambda ratio: abs(ratio - 1) <= THROUGHPUT_WITHIN)


def _capacity(results: Results, model: str, other: str) -> Iterator[Verdict]:
    found = {(f.subject, f.turn): f.capacity for f in results.found if f.model == model}
    pairs = [(found[SARATHI, t], found[other, t]) for s, t in found if s == SARATHI and (other, t) in found]
    ratios = [ours.holds / theirs.holds for ours, theirs in pairs if theirs.holds]
    if ratios:
        target = f"capacity, {SARATHI} / {other}: at least {LEAST_CAPACITY_RATIO}"
        yield Verdict.of(model, target, ratios, lambda ratio: ratio >= LEAST_CAPACITY_RATIO)
