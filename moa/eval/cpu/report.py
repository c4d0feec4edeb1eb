"""What `moa bench kernels --device cpu` writes: kernels.csv, growth.csv, kernels.png, and a page of tables."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure

from moa.eval.cpu.bench import GROWTH_SPAN, Growth, Row
from moa.eval.cpu.cases import DECODE_LAYERS, DENSE, OURS, PLANS
from moa.eval.csv_rows import csv_rows
from moa.eval.figures import COLOURS, MARKERS, png
from moa.eval.markdown import table
from moa.files import write_atomic
from moa.local_paths import typed_command
from moa.units import human_bytes


def write_report(rows: Sequence[Row], grown: Sequence[Growth], folder: Path) -> None:
    """Write the four files, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "kernels.csv", csv_rows(rows, Row))
    write_atomic(folder / "growth.csv", csv_rows(grown, Growth))
    write_atomic(folder / "kernels.png", picture(rows))
    write_atomic(folder / "README.md", page(rows, grown).encode())


def conditions() -> tuple[str, ...]:
    """Lines that say how the figures were taken."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    cpu = known.get("cpu_name", platform.machine())
    versions = f"moa {version('moa')}, torch {torch.__version__}, Python {platform.python_version()}"
    return (
        f"CPU {cpu}, {torch.get_num_threads()} threads; {versions}",
        "every turn times all subjects of a case one after the other, so that other load on the machine falls on all alike",
        "times are CPU seconds of all threads (wall seconds are in the CSV); OMP_WAIT_POLICY=PASSIVE, or waiting counts",
        "a ratio is taken within a turn; cells have its median over turns, and the quantiles at 20 and 80 %",
        "dense: scaled_dot_product_attention on contiguous keys and values, is_causal for prefill",
        f"a decode step runs through {DECODE_LAYERS} layers, as in a model; times are per layer",
        "dense decode has the query heads of a KV head as rows, its fastest form, and stores its token in place",
        f"spans keep a share of the length so far, {GROWTH_SPAN:,} tokens for the growth; sinks 64, least span 128",
        f"{datetime.now(UTC):%Y-%m-%d}, `{typed_command()}`",
    )


def picture(rows: Sequence[Row]) -> bytes:
    """PNG of dense time over ours against the part of pairs computed, prefill and decode at the longest length."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        mine = [row for row in rows if row.kind == kind and row.subject == OURS and "two" not in row.plan]
        longest = max((row.tokens for row in mine), default=0)
        shapes = sorted({(r.dtype, r.head_dim, r.query_heads // r.kv_heads) for r in mine})
        for i, (dtype, size, group) in enumerate(shapes):
            line = [r for r in mine if (r.dtype, r.head_dim, r.query_heads // r.kv_heads) == (dtype, size, group)]
            points = sorted((r.pairs_ratio, r.dense_over_it) for r in line if r.tokens == longest and r.dense_over_it)
            style = {
                "color": COLOURS[i // 2 % len(COLOURS)],
                "marker": MARKERS[i // 2 % len(MARKERS)],
                "ls": "-" if group == 1 else "--",
            }
            axes.plot(*zip(*points, strict=True), label=f"{dtype}, D={size}, {group}:1", **style)
        axes.plot(ideal := [0.125, 0.25, 0.5, 1.0], [1 / x for x in ideal], color="#555555", ls=":", label="work saved")
        axes.set(
            xscale="log",
            yscale="log",
            title=f"{kind}, {longest:,} tokens",
            xlabel="part computed",
            ylabel="dense / moa",
        )
        axes.set_xticks(ideal, ["12.5 %", "25 %", "50 %", "100 %"])
        axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return png(figure)


def page(rows: Sequence[Row], grown: Sequence[Growth]) -> str:
    """The README of a results folder."""
    lines = "\n".join(f"- {line}" for line in conditions())
    growth = table(
        ("tokens", "CPU seconds", "peak memory"),
        [(f"{g.tokens:,}", f"{g.seconds:.2f}", human_bytes(g.peak_bytes)) for g in grown],
    )
    return f"""# Attention kernels on a CPU

How many times faster than torch's own dense attention the torch backend is, for plans of growing density.

{lines}

![dense over moa](kernels.png)

## Prefill

{_ratios(rows, "prefill")}

## Decode, one token behind a cache

{_ratios(rows, "decode")}

## Growth: one head of 64, float32, a span of {GROWTH_SPAN:,} tokens

{growth}

Peak memory is what a prefill takes beside q, k and v, its output included.

## Two rules per layer over one rule of the same mean density

{_mixed(rows)}
"""


def _shape(row: Row) -> tuple[str, ...]:
    heads = f"{row.query_heads}:{row.kv_heads}"
    return f"{row.tokens:,}", row.dtype, str(row.head_dim), heads


def _ratios(rows: Sequence[Row], kind: str) -> str:
    """A line per shape: dense time, and dense over each other subject."""
    mine = [row for row in rows if row.kind == kind]
    others = list(dict.fromkeys((row.subject, row.plan) for row in mine if row.subject != DENSE))
    lines = []
    for shape in dict.fromkeys(_shape(row) for row in mine):
        here = {(row.subject, row.plan): row for row in mine if _shape(row) == shape}
        dense = here[DENSE, ""].median_s
        cells = [_cell(here.get(other)) for other in others]
        lines.append((*shape, "" if dense is None else f"{1e3 * dense:.2f} ms", *cells))
    names = [plan if subject == OURS else f"{subject}, {plan}" for subject, plan in others]
    return table(("tokens", "dtype", "D", "heads", "dense", *names), lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "not measured"
    if row.dense_over_it is None:
        return row.reason
    return f"{row.dense_over_it:.2f} ({row.dense_over_it_low:.2f} to {row.dense_over_it_high:.2f})"


def _mixed(rows: Sequence[Row]) -> str:
    """Median time of the plan with two rules over that of the uniform one, per shape."""
    uniform, mixed = (next(p for p in PLANS if p == name) for name in ("25 %", "two rules, 25 %"))
    at = {(row.kind, *_shape(row), row.plan): row.median_s for row in rows if row.subject == OURS}
    lines = []
    for key in dict.fromkeys((row.kind, *_shape(row)) for row in rows):
        a, b = at.get((*key, uniform)), at.get((*key, mixed))
        lines.append((*key, f"{b / a:.2f}" if a and b else "not measured"))
    return table(("kind", "tokens", "dtype", "D", "heads", "two rules / one"), lines)
