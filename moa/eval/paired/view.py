"""A paired report as its readers ask for it: by length, task and variant, means over tasks, scores by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from moa.eval.paired.records import Difference, PairedReport, TaskScores, Variant
from moa.eval.paired.statistics import mean_interval

DEPTH_BUCKETS = 5
Cell = tuple[str, int | None, str]  # task, length in tokens, metric
Tone = Literal["", "better", "worse"]


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of several tasks' shares, or of their differences to dense, with the interval that follows from theirs.

    Args:
        value, low, high: mean and 95 % interval.
        shares: how many were averaged.
    """

    value: float
    low: float
    high: float
    shares: int

    @property
    def tone(self) -> Tone:
        """Whether a difference's interval leaves out 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else ""


class View:
    """One report, with what tables and pictures look up over and over looked up once."""

    def __init__(self, report: PairedReport) -> None:
        self.report = report
        self.dense, *self.others = report.variants
        self._scores = {(found.variant, found.cell): found for found in report.scores}
        self._differences = {(d.variant, (d.task, d.length_tokens, d.metric)): d for d in report.differences}

    @cached_property
    def lengths(self) -> tuple[int | None, ...]:
        """Ascending; None, for tasks that have no such thing, at the end."""
        found = dict.fromkeys(length for _, length, _ in self.report.cells)
        return tuple(sorted(found, key=lambda n: math.inf if n is None else n))

    @cached_property
    def has_kv_bytes(self) -> bool:
        """Whether any variant says what it keeps."""
        return any(variant.kv for variant in self.report.variants)

    def cells(self, length: int | None) -> list[Cell]:
        """Every task and metric at one length."""
        return [cell for cell in self.report.cells if cell[1] == length]

    def scores(self, variant: Variant, cell: Cell) -> TaskScores | None:
        """One variant's scores in one cell."""
        return self._scores.get((variant.name, cell))

    def difference(self, variant: Variant, cell: Cell) -> Difference | None:
        """One variant beside dense in one cell."""
        return self._differences.get((variant.name, cell))

    def tone(self, difference: Difference | None) -> Tone:
        """Whether the interval of a difference leaves out 0, and on which side."""
        if difference is None or difference.low is None or difference.high is None:
            return ""
        up = self._scores[difference.variant, (difference.task, difference.length_tokens, difference.metric)]
        above, below = difference.low > 0, difference.high < 0
        if not above and not below:
            return ""
        return "better" if above == up.higher_is_better else "worse"

    def shares(self, length: int | None) -> list[Cell]:
        """The cells at one length whose scores are shares under every variant that has them."""
        return [
            cell
            for cell in self.cells(length)
            if all(found.bounded for v in self.report.variants if (found := self.scores(v, cell)))
        ]

    def mean(self, variant: Variant, length: int | None) -> Mean | None:
        """Mean share over tasks at one length; None where the variant lacks one of them, or there is none."""
        cells = self.shares(length)
        found = [scores for cell in cells if (scores := self.scores(variant, cell))]
        bounds = [(scores.mean, *interval) for scores in found if (interval := scores.interval)]
        return Mean(*mean_interval(bounds), len(bounds)) if bounds and len(bounds) == len(cells) else None

    def mean_difference(self, variant: Variant, length: int | None) -> Mean | None:
        """Mean difference to dense over the same tasks as `mean`."""
        return _mean([self.difference(variant, cell) for cell in self.shares(length)])

    @cached_property
    def loss_metrics(self) -> tuple[str, ...]:
        """What losses are measured, in nats each."""
        return tuple(dict.fromkeys(s.metric for s in self.report.scores if not s.bounded and not s.higher_is_better))

    def loss_difference(self, variant: Variant, length: int | None, metric: str) -> Mean | None:
        """Mean difference of one loss to dense over tasks; None where the variant or an interval lacks in any."""
        cells = [cell for cell in self.cells(length) if cell[2] == metric]
        return _mean([self.difference(variant, cell) for cell in cells])

    @cached_property
    def with_depth(self) -> tuple[Cell, ...]:
        """Cells of shares whose samples say where in the text the evidence begins."""
        return tuple(
            cell
            for length in self.lengths
            for cell in self.shares(length)
            if (found := next((s for v in self.report.variants if (s := self.scores(v, cell))), None))
            and all(sample.depth_ratio is not None for sample in found.samples)
        )

    def by_depth(self, variant: Variant, cells: Sequence[Cell]) -> list[tuple[float, int] | None]:
        """Mean score and number of samples in each of `DEPTH_BUCKETS` equal parts of the text, over several cells."""
        buckets: list[list[float]] = [[] for _ in range(DEPTH_BUCKETS)]
        for cell in cells:
            found = self.scores(variant, cell)
            for sample in found.samples if found else ():
                if sample.depth_ratio is not None:
                    buckets[_bucket(sample.depth_ratio)].append(sample.score)
        return [(math.fsum(b) / len(b), len(b)) if b else None for b in buckets]


def depth_bounds() -> list[str]:
    """`0–20 %` and so on."""
    return [f"{100 * i // DEPTH_BUCKETS}–{100 * (i + 1) // DEPTH_BUCKETS} %" for i in range(DEPTH_BUCKETS)]


def _mean(differences: Sequence[Difference | None]) -> Mean | None:
    """None where there are none, or one has no interval."""
    bounds = [(d.difference, d.low, d.high) for d in differences if d and d.low is not None and d.high is not None]
    return Mean(*mean_interval(bounds), len(bounds)) if bounds and len(bounds) == len(differences) else None


def _bucket(depth_ratio: float) -> int:
    return min(DEPTH_BUCKETS - 1, int(depth_ratio * DEPTH_BUCKETS))
