"""What `moa bench serve --request-rate` writes: serve.csv, serve.json, and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moa.eval.csv_rows import csv_rows
from moa.eval.markdown import table
from moa.eval.serving.conditions import lines
from moa.eval.serving.rows import Row
from moa.eval.serving.sweep import Sweep, Swept
from moa.files import write_atomic


def write_sweep(swept: Sequence[Swept], sweep: Sweep, told: dict[str, object], folder: Path) -> None:
    """Write all files, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [one.keys for one in swept]
    write_atomic(folder / "serve.csv", csv_rows([one.row for one in swept], Row))
    write_atomic(folder / "serve.json", json.dumps({"moa": told, "runs": runs}, indent=1).encode())
    write_atomic(folder / "README.md", page(swept, sweep, told).encode())


def page(swept: Sequence[Swept], sweep: Sweep, told: dict[str, object]) -> str:
    """The README of a results folder."""
    listed = "\n".join(f"- {line}" for line in (*_method(sweep), *lines(told)))
    rows = [_cells(one) for one in swept]
    headings = ["subject", "rate /s", "failed", "requests/s", "output tokens/s"]
    headings += ["TTFT P50", "TTFT P99", "TBT P50", "TBT P99"]
    if sweep.goals is not None:
        headings.append("goodput /s")
        rows = [(*row, f"{one.keys['request_goodput']:.2f}") for row, one in zip(rows, swept, strict=True)]
    return f"""# Serving at given rates

{listed}

{table(headings, rows)}

Times in milliseconds.
"""


def _method(sweep: Sweep) -> list[str]:
    asked = sweep.workload
    loop = "open loop" if asked.max_concurrency is None else f"at most {asked.max_concurrency} in flight"
    arrivals = "Poisson arrivals" if asked.burstiness == 1 else f"burstiness {asked.burstiness:g}"
    together = "" if asked.burst == 1 else f", {asked.burst} at a time"
    return [
        f"{asked.count} requests a run, prompts of {asked.prompts} tokens, outputs of {asked.outputs}; {arrivals}{together}, {loop}",
        f"{sweep.turns} turn{'s' * (sweep.turns > 1)} with seeds from {sweep.seed} on, after a first request that is not told",
    ]


def _cells(one: Swept) -> tuple[str, ...]:
    """A run's line of the table."""
    row = one.row
    speeds = f"{row.requests_per_s:.2f}", f"{row.output_tokens_per_s:.1f}"
    times = map(_cell, (row.ttft_p50_ms, row.ttft_p99_ms, row.tbt_p50_ms, row.tbt_p99_ms))
    return (row.subject, f"{row.rate:g}", str(row.failed), *speeds, *times)


def _cell(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"
