"""`moa bench serve --request-rate`: subjects at given rates, as a load test of one server or a look at several policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from moa.eval.serving.drive import Run, Subject, drive
from moa.eval.serving.rows import SWEEP, Row, row_of
from moa.eval.serving.summary import PERCENTILES, Goals, Keys, details, finite, summary
from moa.eval.serving.workload import Load, Workload
from moa.stages import Progress


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked of each subject.

    Args:
        workload: of every run; its rate is replaced.
        rates: requests per second, infinite for all at once.
        turns: each with a seed of its own.
        seed: of the first.
        goals: for goodput.
        percentiles: told of every metric.
        has_details: whether a value per request is told, too.
    """

    workload: Workload
    rates: tuple[float, ...]
    turns: int = 1
    seed: int = 0
    goals: Goals | None = None
    percentiles: tuple[float, ...] = PERCENTILES
    has_details: bool = False


@dataclass(frozen=True, slots=True)
class Swept:
    """A run: its row, and its keys as vLLM's benchmark names them."""

    row: Row
    keys: Keys


def run_sweep(
    model: str, subjects: Sequence[Callable[[], AbstractContextManager[Subject]]], sweep: Sweep, progress: Progress
) -> Iterator[Swept]:
    """Every subject at every rate, in turns; the first run of each subject is not told, since first runs are slow."""
    done, total = 0, sweep.turns * len(sweep.rates) * len(subjects)
    for turn in range(sweep.turns):
        for make in subjects:
            with make() as subject:
                drive(subject, _first(sweep.workload))
                for rate in sweep.rates:
                    loads = replace(sweep.workload, rate=rate).requests(sweep.seed + turn)
                    run = drive(subject, loads, max_concurrency=sweep.workload.max_concurrency)
                    yield _swept((model, subject.name, SWEEP, turn), rate, run, sweep, subject.about)
                    progress("load", done := done + 1, total)


def _first(workload: Workload) -> tuple[Load, ...]:
    return replace(workload, rate=float("inf"), count=1).requests(0)


def _swept(names: tuple[str, str, str, int], rate: float, run: Run, sweep: Sweep, about: Mapping[str, object]) -> Swept:
    keys = summary(run, sweep.goals, sweep.percentiles)
    row = row_of(names, rate, run, keys, None, holds=not keys["failed"])
    told = {"model": names[0], "subject": names[1], "stage": names[2], "turn": names[3], **about}
    more = details(run) if sweep.has_details else {}
    return Swept(row, {"request_rate": finite(rate), **keys, **more, "moa": told})
