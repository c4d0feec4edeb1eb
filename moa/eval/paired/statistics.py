"""Differences of two ways of running one model on the same samples, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from moa.eval.records import wilson

FloatArray = npt.NDArray[np.float64]
Interval = Literal["newcombe", "student-t", "none"]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of `ours - theirs` over samples.

    Args:
        value: the mean.
        low, high: 95 % interval; equal to minus and plus infinity where there are too few samples for one.
        interval: how it was made.
        p_value: exact McNemar test where every score is 0 or 1, else Student's t test; None where nothing differs.
        better, worse: samples with a higher, a lower score.
    """

    value: float
    low: float
    high: float
    interval: Interval
    p_value: float | None
    better: int
    worse: int


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, bounded: bool) -> PairedDifference:
    """Compare scores of the same samples.

    Args:
        ours, theirs: in the same order, at least one.
        bounded: scores are shares, between 0 and 1: then Newcombe's interval, which stays wide where few samples agree
            in everything; else Student's t.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    changes = a - b
    low, high, interval = _newcombe(a, b) if bounded else _student(changes)
    return PairedDifference(
        value=float(changes.mean()),
        low=low,
        high=high,
        interval=interval,
        p_value=_p_value(a, b),
        better=int((changes > 0).sum()),
        worse=int((changes < 0).sum()),
    )


def mean_interval(values: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent (value, low, high), with the interval that follows from theirs.

    The method of variance estimates recovery (Zou and Donner 2008), as in Newcombe's interval.
    """
    middle, low, high = (np.array(column) for column in zip(*values, strict=True))
    mean = float(middle.mean())
    down = math.sqrt(float(((middle - low) ** 2).sum())) / len(values)
    up = math.sqrt(float(((high - middle) ** 2).sum())) / len(values)
    return mean, mean - down, mean + up


def _newcombe(a: FloatArray, b: FloatArray) -> tuple[float, float, Interval]:
    """Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on paired
    data", method 10; with scores between 0 and 1 in place of 0 or 1 it is wider than needed.
    """
    p, q = float(a.mean()), float(b.mean())
    (low_p, high_p), (low_q, high_q) = wilson(float(a.sum()), len(a)), wilson(float(b.sum()), len(b))
    phi = _correlation(a, b)
    down = (p - low_p) ** 2 - 2 * phi * (p - low_p) * (high_q - q) + (high_q - q) ** 2
    up = (high_p - p) ** 2 - 2 * phi * (high_p - p) * (q - low_q) + (q - low_q) ** 2
    return p - q - math.sqrt(max(0.0, down)), p - q + math.sqrt(max(0.0, up)), "newcombe"


def _correlation(a: FloatArray, b: FloatArray) -> float:
    """Correlation of paired scores with Newcombe's correction for continuity; 0 where either does not vary."""
    spread = float(a.std() * b.std())
    shared = float((a * b).mean() - a.mean() * b.mean())
    if spread == 0:
        return 0.0
    corrected = max(0.0, shared - 1 / (2 * len(a))) if shared > 0 else shared
    return max(-1.0, min(1.0, corrected / spread))


def _student(changes: FloatArray) -> tuple[float, float, Interval]:
    if len(changes) < 2:
        return -math.inf, math.inf, "none"
    half = float(stats.t.ppf(0.975, len(changes) - 1) * changes.std(ddof=1) / math.sqrt(len(changes)))
    return float(changes.mean()) - half, float(changes.mean()) + half, "student-t"


def _p_value(a: FloatArray, b: FloatArray) -> float | None:
    changes = a - b
    if not changes.any():
        return None
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        better, worse = int((changes > 0).sum()), int((changes < 0).sum())
        return float(stats.binomtest(better, better + worse).pvalue)
    if len(changes) < 2 or changes.std() == 0:
        return None
    return float(
        2 * stats.t.sf(abs(changes.mean()) / (changes.std(ddof=1) / math.sqrt(len(changes))), len(changes) - 1)
    )
