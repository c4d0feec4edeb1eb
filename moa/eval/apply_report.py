"""What `moa bench apply` writes: apply.csv and a page of tables."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from moa.eval.bench_apply import DENSE, DENSITIES, QUARTER, Row, break_even_tokens, shapes
from moa.eval.csv_rows import csv_rows
from moa.eval.markdown import table
from moa.files import write_atomic
from moa.local_paths import typed_command
from moa.units import human_bytes

# A wrapper under a dense plan may add so much.
MOST_ADDED_PERCENT = 5


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Write both files, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "apply.csv", csv_rows(rows, Row))
    write_atomic(folder / "README.md", page(rows).encode())


def conditions(rows: Sequence[Row]) -> tuple[str, ...]:
    """Lines that say how the figures were taken."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    cpu = known.get("cpu_name", platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in ("moa", "torch", "transformers"))
    measured = {row.model for row in rows}
    return (
        f"CPU {cpu}, {torch.get_num_threads()} threads, float32; {versions}, Python {platform.python_version()}",
        *(f"{s.name}: {s.note}" for s in shapes(max(row.tokens for row in rows)) if s.name in measured),
        "stock: transformers with sdpa and its dynamic cache; moa: the same model with `moa.apply`, backend torch",
        "both run in turns, whose order alternates; a decode step is one token behind a cache of so many",
        "times are medians of CPU seconds of all threads (wall seconds are in the CSV), which other load hardly changes",
        "a ratio is taken within a turn; cells have its median over turns, and the quantiles at 20 and 80 %",
        f"{datetime.now(UTC):%Y-%m-%d}, `{typed_command()}`",
    )


def page(rows: Sequence[Row]) -> str:
    """The README of a results folder."""
    lines = "\n".join(f"- {line}" for line in conditions(rows))
    return f"""# What it costs to be attached

moa's time over stock transformers': 1.05 is {MOST_ADDED_PERCENT} % more, 0.50 is twice as fast.

{lines}

## Under a dense plan, which saves nothing

{_times(rows, DENSE)}

{_target(rows)}

## At 25 %

{_times(rows, QUARTER)}

## KV bytes

{_bytes(rows)}

## Break-even

{_break_even(rows)}
"""


def _times(rows: Sequence[Row], plan: str) -> str:
    lines = [
        (
            row.model,
            row.kind,
            f"{row.tokens:,}",
            str(row.turns),
            f"{1e3 * row.stock_s:.2f} ms",
            f"{1e3 * row.moa_s:.2f} ms",
            f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})",
        )
        for row in rows
        if row.plan == plan
    ]
    return table(("model", "kind", "tokens", "turns", "stock", "moa", "moa / stock"), lines)


def _target(rows: Sequence[Row]) -> str:
    """What misses the target, by name."""
    dense = [row for row in rows if row.plan == DENSE]
    over = [row for row in dense if row.ratio > 1 + MOST_ADDED_PERCENT / 100]
    told = f"At most {MOST_ADDED_PERCENT} % are added in {len(dense) - len(over)} of {len(dense)} cases"
    missed = "; ".join(f"{r.model} {r.kind} at {r.tokens:,}: {100 * (r.ratio - 1):.0f} %" for r in over)
    return f"{told}. More: {missed}." if over else f"{told}."


def _bytes(rows: Sequence[Row]) -> str:
    lines = [
        (
            row.model,
            row.plan,
            f"{row.tokens:,}",
            human_bytes(row.stock_kv_bytes),
            human_bytes(row.moa_kv_bytes),
            f"{100 * row.moa_kv_bytes / row.stock_kv_bytes:.1f} %",
        )
        for row in rows
        if row.kind == "decode" and row.plan in DENSITIES
    ]
    return table(("model", "plan", "tokens", "stock", "moa", "moa / stock"), lines)


def _break_even(rows: Sequence[Row]) -> str:
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        found = break_even_tokens(rows, model)
        lines.append((model, "none measured" if found is None else f"{found:,} tokens"))
    return table(("model", "a decode step at 25 % takes no longer than stock from"), lines)
