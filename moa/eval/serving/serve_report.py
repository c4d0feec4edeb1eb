"""What `moa bench serve` writes: serve.csv, capacity.csv, serve.json, two pictures, and a page of tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa.eval.csv_rows import csv_rows
from moa.eval.markdown import table
from moa.eval.serving import pictures
from moa.eval.serving.bench_serve import Results, Settings
from moa.eval.serving.cases import Case
from moa.eval.serving.conditions import environment, lines
from moa.eval.serving.rows import EQUAL, Row, by_subject
from moa.eval.serving.stages import BUDGET_SHARE, EQUAL_SHARE, SLO_STEPS, STEP_BATCH, WAIT_SLOS, Setup
from moa.eval.serving.verdicts import verdict_table, verdicts
from moa.files import write_atomic


@dataclass(frozen=True, slots=True)
class CapacityRow:
    """A line of capacity.csv: rates in requests per second."""

    model: str
    subject: str
    turn: int
    holds_per_s: float
    fails_per_s: float
    trials: int


def write_report(results: Results, settings: Settings, folder: Path) -> None:
    """Write all files, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    told = environment(settings.plan)
    found = [
        CapacityRow(f.model, f.subject, f.turn, f.capacity.holds, f.capacity.fails, f.capacity.trials)
        for f in results.found
    ]
    write_atomic(folder / "serve.csv", csv_rows(results.rows, Row))
    write_atomic(folder / "capacity.csv", csv_rows(found, CapacityRow))
    write_atomic(folder / "serve.json", json.dumps({"moa": told, "runs": results.runs}, indent=1).encode())
    write_atomic(folder / "tbt.png", pictures.gaps(results))
    write_atomic(folder / "latency.png", pictures.latencies(results))
    write_atomic(folder / "README.md", page(results, settings, told).encode())


def page(results: Results, settings: Settings, told: dict[str, object]) -> str:
    """The README of a results folder."""
    listed = "\n".join(f"- {line}" for line in (*_method(results, settings), *lines(told)))
    return f"""# Serving

What long prompts do to requests that decode, under each scheduling policy of one engine, and how much load each can take.

{listed}

## Targets

{verdict_table(list(verdicts(results)))}

## One rate for all

{_equal(results)}

![times between tokens](tbt.png)

## Capacity

{_capacities(results)}

![latency against rate](latency.png)
"""


def _method(results: Results, settings: Settings) -> Iterator[str]:
    first = settings.policies[0]
    yield "one load generator for all, open loop: requests are sent when they are due, and times count from then"
    yield "seconds in which nobody has anything to do are leapt over"
    yield f"{settings.turns} turns, seeds from {settings.seed} on; subjects of a turn follow each other in an order that alternates"
    yield "a turn begins by timing a decode step, which gives its target, budget and rates"
    yield "a ratio is taken within a turn, on the same requests; figures are medians over turns"
    yield f"the target: P99 of times between tokens (TBT) at most {SLO_STEPS:g} decode steps of {STEP_BATCH} requests"
    yield (
        "capacity: the highest rate that keeps the target, no request failed, and the median one waiting at most "
        f"{WAIT_SLOS:g} targets for its first token"
    )
    yield "no rate counts above what a subject gets done when all requests are there from the start"
    yield f"one rate: {100 * EQUAL_SHARE:.0f} % of what `{first}` gets done when all requests are there from the start"
    yield (
        f"the token budget of `sarathi` is the largest whose steps take at most {100 * BUDGET_SHARE:.0f} % of the target; "
        "other policies do not cut prompts"
    )
    for name, case in results.cases.items():
        yield from _about(name, case, results.setups[name])


def _about(name: str, case: Case, setups: Sequence[Setup]) -> Iterator[str]:
    long, chat = case.long, case.chat
    steps = ", ".join(f"{1e3 * setup.step_s:.1f}" for setup in setups)
    targets = ", ".join(f"{1e3 * setup.slo_s:.0f}" for setup in setups)
    budgets = ", ".join(str(setup.token_budget) for setup in setups)
    yield f"{name}: {case.note}"
    yield f"{name}, by turn: a decode step takes {steps} ms, the target is {targets} ms, the budget {budgets} tokens"
    yield (
        f"{name}, one rate: {long.waves} waves of {long.wave} decodes of {long.wave_tokens} tokens, and {long.count} prompts "
        f"({long.prompts} tokens) that arrive into them"
    )
    yield f"{name}, capacity: {chat.count} requests, prompts {chat.prompts}, outputs {chat.outputs}"


def _equal(results: Results) -> str:
    """Medians over turns."""
    lines_ = []
    for key, mine in by_subject([r for r in results.rows if r.stage == EQUAL]):
        cells = [_median([getattr(r, name) for r in mine], digits) for name, digits in _COLUMNS]
        lines_.append((*key, *cells))
    headings = ("model", "policy", "rate /s", "output tokens/s", "TTFT P50", "TBT P50", "TBT P99", "TBT most", "failed")
    return table(headings, lines_) + "\n\nTimes in milliseconds."


_COLUMNS = (
    ("rate", 2),
    ("output_tokens_per_s", 1),
    ("ttft_p50_ms", 0),
    ("tbt_p50_ms", 1),
    ("tbt_p99_ms", 1),
    ("tbt_most_ms", 0),
    ("failed", 0),
)


def _capacities(results: Results) -> str:
    lines_ = []
    for key, found in by_subject(results.found):
        mine = [f.capacity for f in found]
        each = ", ".join(f"{c.holds:.2f}" for c in mine)
        lines_.append((*key, _median([c.holds for c in mine], 2), each, str(sum(c.trials for c in mine))))
    return table(("model", "policy", "capacity /s", "turns", "trials"), lines_)


def _median(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):,.{digits}f}" if known else "none"
