"""Rows of `serve.csv`: one per run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from moa.eval.serving.drive import Run
from moa.eval.serving.summary import Keys, percentile, share_over, values_s

EQUAL, CAPACITY, SWEEP = "equal rate", "capacity", "sweep"


class OfSubject(Protocol):
    """What is told of a model under a subject."""

    @property
    def model(self) -> str: ...
    @property
    def subject(self) -> str: ...


Told = TypeVar("Told", bound=OfSubject)


def by_subject(rows: Sequence[Told]) -> Iterator[tuple[tuple[str, str], list[Told]]]:
    """Model and subject, and their rows, for each pair in the order of its first row."""
    for key in dict.fromkeys((row.model, row.subject) for row in rows):
        yield key, [row for row in rows if (row.model, row.subject) == key]


@dataclass(frozen=True, slots=True)
class Row:
    """One run of one subject: a rate in requests per second, times in milliseconds.

    `tbt_*` are times between tokens, pooled over requests; `tbt_limit_ms` is the target for their 99th percentile and
    `over_limit_share` the part above it. A run that was given up has missed the target, and its figures are of a part.
    """

    model: str
    subject: str
    stage: str
    turn: int
    rate: float
    requests: int
    completed: int
    failed: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    tbt_p50_ms: float | None
    tbt_p99_ms: float | None
    tbt_most_ms: float | None
    tbt_limit_ms: float | None
    over_limit_share: float | None
    holds: bool
    is_given_up: bool


def row_of(
    names: tuple[str, str, str, int], rate: float, run: Run, keys: Keys, limit_s: float | None, *, holds: bool
) -> Row:
    """The row of a run: (model, subject, stage, turn), and what it says."""
    gaps, waits = values_s(run, "itl"), values_s(run, "ttft")

    def ms(values: list[float], percent: float) -> float | None:
        found = percentile(values, percent)
        return None if found is None else 1e3 * found

    return Row(
        *names,
        rate=rate,
        requests=len(run.served),
        completed=keys["completed"],
        failed=keys["failed"],
        duration_s=keys["duration"],
        requests_per_s=keys["request_throughput"],
        output_tokens_per_s=keys["output_throughput"],
        ttft_p50_ms=ms(waits, 50),
        ttft_p99_ms=ms(waits, 99),
        tpot_p50_ms=ms(values_s(run, "tpot"), 50),
        tbt_p50_ms=ms(gaps, 50),
        tbt_p99_ms=ms(gaps, 99),
        tbt_most_ms=ms(gaps, 100),
        tbt_limit_ms=None if limit_s is None else 1e3 * limit_s,
        over_limit_share=None if limit_s is None else share_over(gaps, limit_s),
        holds=holds,
        is_given_up=run.is_given_up,
    )
