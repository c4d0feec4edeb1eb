"""What `moa bench throughput` writes: three tables as CSV, and a page with targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from moa.eval.csv_rows import csv_rows
from moa.eval.markdown import table
from moa.eval.serving.bench_throughput import BATCHING_RUNNING, OFFLINE_BUDGET, OURS, Results, Settings
from moa.eval.serving.conditions import environment, lines
from moa.eval.serving.rows import by_subject
from moa.eval.serving.subjects import MAX_RUNNING
from moa.eval.serving.throughput_rows import LongRow, OfflineRow, OverheadRow
from moa.eval.serving.verdicts import Verdict, verdict_table
from moa.files import write_atomic
from moa.units import human_bytes

# What transformers' two ways are to be beaten by, how many more long texts fit, and what the engine may cost.
LEAST_RATIOS = {"transformers, continuous batching": 1.0, "transformers, generate() in a loop": 3.0}
LEAST_CONCURRENT_RATIO, LEAST_DECODE_RATIO, MOST_OVERHEAD_RATIO = 2.5, 1.0, 0.05


def write_report(results: Results, settings: Settings, folder: Path) -> None:
    """Write all files, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    told = environment(settings.plan)
    write_atomic(folder / "offline.csv", csv_rows(results.offline, OfflineRow))
    write_atomic(folder / "long.csv", csv_rows(results.long, LongRow))
    write_atomic(folder / "overhead.csv", csv_rows(results.overhead, OverheadRow))
    content = {name: [asdict(row) for row in getattr(results, name)] for name in ("offline", "long", "overhead")}
    write_atomic(folder / "throughput.json", json.dumps({"moa": told, **content}, indent=1).encode())
    write_atomic(folder / "README.md", page(results, settings, told).encode())


def verdicts(results: Results) -> Iterator[Verdict]:
    """All targets that the results say something about; ratios within a turn."""
    for model in results.cases:
        speed = {(r.subject, r.turn): r.output_tokens_per_s for r in results.offline if r.model == model}
        for other, least in LEAST_RATIOS.items():
            ratios = [speed[OURS, t] / value for (s, t), value in speed.items() if s == other]
            yield from _at_least(model, f"output tokens per second, {OURS} / {other}", ratios, least)
        yield from _long_verdicts(results, model)
        shares = [row.overhead_ratio for row in results.overhead if row.model == model]
        if shares:
            target = f"part of a decode step that is not the forward pass: at most {MOST_OVERHEAD_RATIO:.2f}"
            yield Verdict.of(model, target, shares, lambda share: share <= MOST_OVERHEAD_RATIO)


def _long_verdicts(results: Results, model: str) -> Iterator[Verdict]:
    rows = [row for row in results.long if row.model == model]
    dense = {row.turn: row for row in rows if row.subject == OURS}
    plans = [row for row in rows if row.subject != OURS]
    more = [row.concurrent / dense[row.turn].concurrent for row in plans]
    yield from _at_least(model, "long texts at a time, plan / dense", more, LEAST_CONCURRENT_RATIO)
    faster = [row.decode_tokens_per_s / dense[row.turn].decode_tokens_per_s for row in plans]
    yield from _at_least(model, "their decode tokens per second, plan / dense", faster, LEAST_DECODE_RATIO)


def _at_least(model: str, what: str, figures: list[float], least: float) -> Iterator[Verdict]:
    if figures:
        yield Verdict.of(model, f"{what}: at least {least:g}", figures, lambda figure: figure >= least)


def page(results: Results, settings: Settings, told: dict[str, object]) -> str:
    """The README of a results folder."""
    listed = "\n".join(f"- {line}" for line in (*_method(results, settings), *lines(told)))
    return f"""# Throughput

All requests at once: the engine beside what transformers offers. Long texts under a plan. What the engine itself costs.

{listed}

## Targets

{verdict_table(list(verdicts(results)))}

## All requests at once

{_offline(results.offline)}

## Long texts under a fixed KV budget

{_long(results.long)}

## Decode steps of a full batch

{_overhead(results.overhead)}
"""


def _method(results: Results, settings: Settings) -> Iterator[str]:
    yield f"{settings.turns} turns, seeds from {settings.seed} on; subjects of a turn follow each other in an order that alternates"
    yield "a ratio is taken within a turn, on the same requests; figures are medians over turns"
    yield (
        f"moa: policy sarathi, {OFFLINE_BUDGET} tokens a step, at most {MAX_RUNNING} requests at a time; transformers' continuous "
        f"batching: sdpa, {OFFLINE_BUDGET} tokens a step, and of {', '.join(map(str, BATCHING_RUNNING))} requests at a time what "
        f"was fastest: {', '.join(f'{running} ({name})' for name, running in results.batching_running.items())}"
    )
    yield "every subject runs one request before it is timed; every request goes on to its last token"
    for name, case in results.cases.items():
        ask = case.offline
        yield f"{name}: {case.note}; {ask.count} requests, prompts {ask.prompts} tokens, outputs {ask.outputs}"
        if case.long_note and settings.long_tokens:
            yield f"{name}, long texts: {case.long_note}"
    if settings.long_tokens:
        yield (
            f"long texts: {settings.long_tokens:,} tokens, memory for {settings.dense_requests} of them dense; the plan keeps "
            f"{100 * settings.density:g} % in every head; their one prompt is computed once and copied, each holds memory of its own"
        )


def _offline(rows: Sequence[OfflineRow]) -> str:
    found = []
    for key, mine in by_subject(rows):
        numbers = (_median([getattr(row, name) for row in mine]) for name in _SPEEDS)
        found.append((*key, *(f"{number:,.2f}" for number in numbers)))
    return table(("model", "subject", "requests/s", "output tokens/s", "all tokens/s"), found)


_SPEEDS = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")


def _long(rows: Sequence[LongRow]) -> str:
    found = []
    for key, mine in by_subject(rows):
        step, speed = (
            _median([getattr(row, name) for row in mine]) for name in ("decode_step_ms", "decode_tokens_per_s")
        )
        concurrent = _median([row.concurrent for row in mine])
        found.append((*key, human_bytes(mine[0].kv_budget_bytes), f"{concurrent:g}", f"{step:.1f} ms", f"{speed:,.1f}"))
    return table(("model", "subject", "KV budget", "at a time", "decode step", "decode tokens/s"), found)


def _overhead(rows: Sequence[OverheadRow]) -> str:
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        step, beside = (_median([getattr(row, name) for row in mine]) for name in ("step_ms", "overhead_ms"))
        share = _median([row.overhead_ratio for row in mine])
        first = mine[0]
        sizes = (str(first.batch), f"{first.context_tokens:,}")
        found.append((model, *sizes, f"{step:.2f} ms", f"{beside:.2f} ms", f"{100 * share:.1f} %"))
    return table(("model", "batch", "prompt tokens", "step", "beside the forward pass", "share"), found)


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
