"""What `moa bench profile` writes: costs.csv, costs.png, and a page of tables."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from moa.eval.bench_profile import KINDS, PROFILE, STEP, CostRow, bench_model, ratios, slope
from moa.eval.conditions import environment
from moa.eval.csv_rows import csv_rows
from moa.eval.figures import COLOURS, MARKERS, png
from moa.eval.markdown import table
from moa.files import write_atomic
from moa.local_paths import typed_command
from moa.units import human_bytes


def write_report(rows: Sequence[CostRow], folder: Path, repeats: int) -> None:
    """Write costs.csv, costs.png and README.md, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "costs.csv", csv_rows(rows, CostRow))
    write_atomic(folder / "costs.png", picture(rows))
    write_atomic(folder / "README.md", page(rows, conditions_of(repeats)).encode())


def conditions_of(repeats: int) -> tuple[str, ...]:
    """Lines that say how the figures were taken."""
    e = environment(bench_model("meta"))
    return (
        "model: random Llama, 2 layers, hidden 128, MLP 344, 2 query heads on 1 KV head of 64; loss of the last 32 tokens",
        f"CPU, {e.dtype}, 1 thread; moa {e.moa}, torch {e.torch}, transformers {e.transformers}, Python {e.python}",
        f"seconds: CPU time of one pass, median of {repeats} alternating ones up to 8,192 tokens, one pass beyond",
        "peak: most resident memory of a process per length, less what was resident before its first pass",
        "the allocator gives freed blocks back at once, as it does by itself with the large blocks of a real model",
        f"{datetime.now(UTC):%Y-%m-%d}, `{typed_command()}`",
    )


def picture(rows: Sequence[CostRow]) -> bytes:
    """PNG of peak memory and of time against the length, both on log scales."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for i, kind in enumerate(KINDS):
        mine = sorted((row for row in rows if row.kind == kind), key=lambda row: row.n_tokens)
        lengths, style = [row.n_tokens for row in mine], {"color": COLOURS[i], "marker": MARKERS[i], "label": kind}
        memory.plot(lengths, [row.peak_bytes / 2**20 for row in mine], **style)
        seconds.plot(lengths, [row.seconds for row in mine], **style)
    for axes, name in ((memory, "peak, MiB"), (seconds, "CPU seconds")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=name)
        axes.grid(alpha=0.3)
        axes.set_xticks(lengths := sorted({row.n_tokens for row in rows}), [f"{n:,}" for n in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), frameon=False)
    return png(figure)


def page(rows: Sequence[CostRow], conditions: Sequence[str]) -> str:
    """The README of a results folder."""
    ordered = sorted(rows, key=lambda row: (row.n_tokens, KINDS.index(row.kind)))
    costs = table(
        ("tokens", "pass", "CPU seconds", "peak", "predicted", "predicted / measured"),
        [(f"{r.n_tokens:,}", r.kind, f"{r.seconds:.2f}", human_bytes(r.peak_bytes), *_prediction(r)) for r in ordered],
    )
    beside = table(
        ("tokens", "memory", "time"), [(f"{n:,}", f"{memory:.2f}", f"{time:.2f}") for n, memory, time in ratios(rows)]
    )
    slopes = f"{slope(rows, PROFILE):.3f} for profiling, {slope(rows, STEP):.3f} for a training step"
    lines = "\n".join(f"- {line}" for line in conditions)
    return f"""# What profiling costs

A gradient point of `moa compress` beside a plain training step of the same model (scaled_dot_product_attention, weights'
gradients included), and beside the same without weights' gradients.

{lines}

Profiling over a training step:

{beside}

Peak memory grows with the length to the power of {slopes} (line through the logarithms).

![memory and time](costs.png)

{costs}

"predicted" is what `moa estimate` and `moa compress` reckon with before a run. Beyond 8,192 tokens only the two passes of
the first table were measured.
"""


def _prediction(row: CostRow) -> tuple[str, str]:
    if row.predicted_bytes is None:
        return "", ""
    return human_bytes(row.predicted_bytes), f"{row.predicted_bytes / row.peak_bytes:.3f}"
