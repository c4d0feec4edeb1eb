"""Pictures of a serving benchmark, as PNG bytes; import it late, it loads matplotlib."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from moa.eval.figures import COLOURS, MARKERS, png
from moa.eval.serving.bench_serve import Results
from moa.eval.serving.rows import CAPACITY

STYLES = ("-", "--", ":", "-.")
LEAST_SHARE = 1e-4


def gaps(results: Results) -> bytes:
    """PNG of the share of times between tokens that are longer than so much, a panel per model."""
    figure, panels = _panels(list(results.setups))
    subjects = list(dict.fromkeys(subject for _, subject in results.gaps_s))
    for name, axes in panels.items():
        for i, subject in enumerate(subjects):
            if values := results.gaps_s.get((name, subject)):
                ms = np.sort(1e3 * np.asarray(values))
                over = 1 - np.arange(len(ms)) / len(ms)  # share at least so long
                axes.step(ms, over, where="pre", label=subject, color=COLOURS[i % 7], ls=STYLES[i % 4])
        axes.axvline(_limit_ms(results, name), color="#555555", ls=":", label="target")
        axes.axhline(0.01, color="#999999", lw=0.8)
        axes.set(xscale="log", yscale="log", ylim=(LEAST_SHARE, 1.1), title=name)
        axes.set(xlabel="time between tokens, ms", ylabel="share that is at least as long")
    return _finished(figure, panels)


def latencies(results: Results) -> bytes:
    """PNG of the 99th percentile of times between tokens against the request rate, hollow where the target was missed."""
    figure, panels = _panels(list(results.setups))
    tried = [row for row in results.rows if row.stage == CAPACITY and row.tbt_p99_ms is not None]
    subjects = list(dict.fromkeys(row.subject for row in tried))
    for name, axes in panels.items():
        mine = [row for row in tried if row.model == name]
        for i, subject in enumerate(subjects):
            kept = [(r.rate, r.tbt_p99_ms) for r in mine if r.subject == subject and r.holds]
            missed = [(r.rate, r.tbt_p99_ms) for r in mine if r.subject == subject and not r.holds]
            style: dict[str, Any] = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "ls": ""}
            if kept:
                axes.plot(*zip(*kept, strict=True), **style, label=subject)
            if missed:
                label = None if kept else subject
                axes.plot(*zip(*missed, strict=True), **style, markerfacecolor="none", label=label)
        axes.axhline(_limit_ms(results, name), color="#555555", ls=":", label="target")
        axes.set(
            xscale="log", yscale="log", title=name, xlabel="requests per second", ylabel="P99 time between tokens, ms"
        )
    return _finished(figure, panels)


def _panels(names: list[str]) -> tuple[Figure, dict[str, Axes]]:
    figure = Figure(figsize=(4.8 * len(names) + 0.4, 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    return figure, dict(zip(names, axes, strict=True))


def _limit_ms(results: Results, name: str) -> float:
    """Median of the turns' targets."""
    return 1e3 * statistics.median(setup.slo_s for setup in results.setups[name])


def _finished(figure: Figure, panels: dict[str, Axes]) -> bytes:
    for axes in panels.values():
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    first = next(iter(panels.values()))
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return png(figure)
