"""What a run says in numbers, under the names that vLLM's serving benchmark gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moa.errors import UsageError, closest
from moa.eval.serving.drive import Run, Served

METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
GOALS = ("ttft", "tpot", "e2el")
Keys = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goals:
    """Targets that a request must meet, all of them, to count as good: milliseconds, as in `ttft:500 tpot:50`."""

    most_ms: Mapping[str, float]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Goals:
        """Read `NAME:MS` words.

        Raises:
            UsageError: not of that form, or another name than ttft, tpot and e2el.
        """
        found = {}
        for text in texts:
            name, _, value = text.partition(":")
            if name not in GOALS:
                raise UsageError(f"goodput knows {', '.join(GOALS)}, got {name!r}{closest(name, GOALS)}")
            try:
                found[name] = float(value)
            except ValueError:
                raise UsageError(f"goodput targets look like {name}:500 (milliseconds), got {text!r}") from None
            if not found[name] > 0:
                raise UsageError(f"a goodput target must be above 0 ms, got {text!r}")
        return cls(found)

    def are_met(self, one: Served) -> bool:
        """Whether a request succeeded and kept every target."""
        return one.has_succeeded and all(1e3 * getattr(one, f"{n}_s") <= most for n, most in self.most_ms.items())


def values_s(run: Run, metric: str) -> list[float]:
    """All values of a metric in seconds, of requests that succeeded.

    `itl` are the times between pieces, pooled over requests, so that long outputs weigh more; `tpot` leaves out requests
    of a single token.
    """
    good = [one for one in run.served if one.has_succeeded]
    if metric == "itl":
        return [gap for one in good for gap in one.gaps_s]
    if metric == "tpot":
        return [one.tpot_s for one in good if one.output_tokens > 1]
    return [getattr(one, f"{metric}_s") for one in good]


def summary(run: Run, goals: Goals | None = None, percentiles: Sequence[float] = PERCENTILES) -> Keys:
    """The aggregates of a run: seconds in `duration`, milliseconds in `*_ms`; None for what has no values."""
    good = [one for one in run.served if one.has_succeeded]
    inputs, outputs = sum(one.input_tokens for one in good), sum(one.output_tokens for one in good)
    seconds = run.duration_s

    def rate(count: int) -> float:
        return count / seconds if seconds > 0 else 0.0

    keys: Keys = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(run.served) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(good)),
        "request_goodput": None if goals is None else rate(sum(map(goals.are_met, run.served))),
        "output_throughput": rate(outputs),
        "total_token_throughput": rate(inputs + outputs),
        "max_output_tokens_per_s": peak_output_tokens(run),
        "max_concurrent_requests": peak_concurrency(run),
    }
    for metric in METRICS:
        keys |= _statistics(metric, values_s(run, metric), percentiles)
    return keys


def details(run: Run) -> Keys:
    """The arrays beside the aggregates, a value per request, in seconds; times of failed requests are 0."""
    served = run.served
    return {
        "input_lens": [one.input_tokens for one in served],
        "output_lens": [one.output_tokens for one in served],
        "ttfts": [one.ttft_s if one.chunk_s else 0.0 for one in served],
        "itls": [one.gaps_s for one in served],
        "latencies": [one.e2el_s if one.has_succeeded else 0.0 for one in served],
        "start_times": [one.sent_s for one in served],
        "queue_times": [one.queue_s for one in served],
        "errors": [one.error for one in served],
    }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between order statistics, as numpy's default; None of nothing."""
    return float(np.percentile(np.asarray(values), percent)) if len(values) else None


def percentile_name(percent: float) -> str:
    """99.0 is p99, 99.9 is p99.9."""
    return f"p{percent:g}"


def peak_output_tokens(run: Run) -> float:
    """The most pieces that came within one of the seconds from the start, as tokens per second."""
    times = [at for one in run.served if one.has_succeeded for at in one.chunk_s]
    return float(np.bincount(np.floor(times).astype(np.int64)).max()) if times else 0.0


def peak_concurrency(run: Run) -> int:
    """The most requests that were in flight at a time; one that ends when another is sent does not overlap it."""
    good = [one for one in run.served if one.has_succeeded]
    changes = sorted([(one.sent_s, 1) for one in good] + [(one.chunk_s[-1], -1) for one in good])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _statistics(metric: str, values: Sequence[float], percentiles: Sequence[float]) -> Keys:
    ms = 1e3 * np.asarray(values)
    names = ("mean", "median", "std")
    found = (float(ms.mean()), float(np.median(ms)), float(ms.std())) if len(ms) else (None, None, None)
    keys: Keys = {f"{name}_{metric}_ms": value for name, value in zip(names, found, strict=True)}
    for percent in percentiles:
        keys[f"{percentile_name(percent)}_{metric}_ms"] = percentile(ms.tolist(), percent)
    return keys


def share_over(values: Sequence[float], limit: float) -> float:
    """Part of values above a limit; 0 of nothing."""
    return sum(value > limit for value in values) / len(values) if values else 0.0


def finite(rate: float) -> float | str:
    """A request rate as JSON has it: "inf" for all at once."""
    return "inf" if math.isinf(rate) else rate
