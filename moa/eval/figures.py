"""Pictures of a report, as PNG bytes; import it late, it loads matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moa.errors import UsageError
from moa.eval.labels import method_label, percent
from moa.eval.records import MethodResult, ParetoPoint, Report, Score
from moa.plan import Plan
from moa.spans import Int64Array

# Okabe and Ito's colours, told apart by colour-blind readers too; markers and line styles say it again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DENSE_COLOUR = "#555555"
DPI = 150
MOST_WRITTEN_CELLS = 320
PANEL_COLUMNS = 3


def span_heat_map(plan: Plan, length_tokens: int) -> bytes:
    """PNG of the spans of every layer and KV head at one length, in tokens on a logarithmic colour scale."""
    spans = plan.span_rules.span(length_tokens)  # [L, HKV]
    layers, heads = spans.shape
    small = layers * heads <= MOST_WRITTEN_CELLS
    figure = Figure(
        figsize=(max(4.6, 2.4 + 0.62 * heads), max(3.4, 1.5 + (0.34 if small else 0.14) * layers)), layout="constrained"
    )
    axes = figure.add_subplot()
    # a scale has two ends, also where every head keeps everything
    low, high = float(min(spans.min(), max(1, length_tokens // 2))), float(max(2, length_tokens))
    image = axes.imshow(spans, cmap="cividis", norm=LogNorm(low, high), aspect="auto")
    axes.set(
        xlabel="KV head",
        ylabel="layer",
        title=f"Span at {length_tokens:,} tokens (density {_density(plan, length_tokens)})",
    )
    axes.set_xticks(_ticks(heads, 16))
    axes.set_yticks(_ticks(layers, 40 if small else 20))
    bar = figure.colorbar(image, label="tokens kept")
    ticks = _powers_of_two(low, high)
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if small:
        _write_cells(axes, spans, low, high)
    return png(figure)


def _density(plan: Plan, length_tokens: int) -> str:
    return percent(plan.span_rules.density_ratio(length_tokens))


def _write_cells(axes: Axes, spans: Int64Array, low: float, high: float) -> None:
    for (layer, head), tokens in np.ndenumerate(spans):
        bright = np.log(tokens / low) / np.log(high / low) > 0.55
        axes.text(head, layer, f"{tokens}", ha="center", va="center", fontsize=8, color="black" if bright else "white")


def _ticks(count: int, most: int) -> list[int]:
    step = -(-count // most)
    return list(range(0, count, step))


def _powers_of_two(low: float, high: float) -> list[float]:
    powers = [2.0**i for i in range(41) if low <= 2.0**i <= high]
    return powers if len(powers) > 1 else [low, high]


def pareto_picture(points: Sequence[ParetoPoint]) -> bytes:
    """PNG of what the optimizer had to choose from: predicted loss at two lengths, or against density for one.

    Of more than two lengths the shortest and the longest are shown.

    Raises:
        UsageError: no points, or points of different lengths.
    """
    lengths = [at.length_tokens for at in points[0].losses] if points else []
    if not points or any([at.length_tokens for at in point.losses] != lengths for point in points):
        raise UsageError("a Pareto picture needs points that have their losses at the same lengths")
    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    last = [point.losses[-1].loss for point in points]
    if len(lengths) > 1:
        first = [point.losses[0].loss for point in points]
        axes.set(xlabel=f"predicted loss at {lengths[0]:,} tokens")
    else:
        first = [100 * point.density_ratio for point in points]
        axes.set(xlabel="density in %")
    axes.set(ylabel=f"predicted loss at {lengths[-1]:,} tokens", title="Candidates of the optimizer")
    order = np.argsort(first)
    axes.plot(np.array(first)[order], np.array(last)[order], color=DENSE_COLOUR, linewidth=1, zorder=1)
    axes.scatter(first, last, color=COLOURS[0], s=42, zorder=2, label="candidate")
    chosen = [i for i, point in enumerate(points) if point.chosen]
    if chosen:
        at = ([first[i] for i in chosen], [last[i] for i in chosen])
        axes.scatter(*at, color=COLOURS[1], marker="*", s=260, edgecolor="black", zorder=3, label="chosen")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def accuracy_curves(report: Report) -> bytes:
    """PNG of recall accuracy against density, one panel per length at which a plan was measured.

    Density is what each plan really keeps at that length; bars are 95 % intervals, the grey band is the dense model's.
    Methods stand up to a few per cent apart sideways, so that bars of equal density do not cover each other.

    Raises:
        UsageError: no method has recall and a plan.
    """
    lengths = [n for n in report.recall_lengths_tokens if any(_point(r, n) for r in report.methods)]
    if not lengths:
        raise UsageError("accuracy curves need at least one method with a plan and recall")
    columns = min(PANEL_COLUMNS, len(lengths))
    rows = -(-len(lengths) // columns)
    # a single panel is wide enough for the legend below it
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 3.3 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, n in zip(panels.flat, lengths, strict=False):
        _panel(axes, report, n)
    for unused in panels.flat[len(lengths) :]:
        unused.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("recall accuracy")
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), frameon=False
    )
    return png(figure)


def _point(result: MethodResult, length_tokens: int) -> tuple[float, Score] | None:
    """Density and score of a method at one length."""
    recall = result.recall_at(length_tokens)
    density = result.plan.density_ratio(length_tokens) if result.plan else None
    return (density, recall.overall) if recall and density is not None else None


def _panel(axes: Axes, report: Report, length_tokens: int) -> None:
    names = list(dict.fromkeys(result.method for result in report.methods))
    densities: set[float] = set()
    for i, name in enumerate(names):
        found = [_point(result, length_tokens) for result in report.methods if result.method == name]
        points = sorted((p for p in found if p), key=lambda point: point[0])
        if not points:
            continue
        densities.update(density for density, _ in points)
        nudge = 2 ** (0.05 * (i - (len(names) - 1) / 2))  # bars of equal density beside, not on top of each other
        _curve(axes, points, nudge, i, method_label(name))
    if dense := report.dense.recall_at(length_tokens):
        score = dense.overall
        axes.axhline(score.accuracy_ratio, color=DENSE_COLOUR, linestyle="--", linewidth=1.3, label="dense", zorder=1)
        axes.axhspan(score.low_ratio, score.high_ratio, color=DENSE_COLOUR, alpha=0.12, linewidth=0)
    axes.set(title=f"{length_tokens:,} tokens", xlabel="density", ylim=(-0.03, 1.05))
    _density_axis(axes, min(densities), max(densities))
    axes.grid(alpha=0.3)


def _curve(axes: Axes, points: Sequence[tuple[float, Score]], nudge: float, index: int, label: str) -> None:
    densities = np.array([density for density, _ in points]) * nudge
    accuracy = np.array([score.accuracy_ratio for _, score in points])
    below = accuracy - np.array([score.low_ratio for _, score in points])
    above = np.array([score.high_ratio for _, score in points]) - accuracy
    axes.errorbar(
        densities,
        accuracy,
        yerr=np.maximum(0, [below, above]),
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        capsize=3,
        markersize=5.5,
        linewidth=1.6,
        label=label,
        zorder=3,
    )


def _density_axis(axes: Axes, low: float, high: float) -> None:
    """Log scale with a tick at every halving, from the one below the least density to the one above the greatest."""
    first, last = math.floor(math.log2(low) + 0.1), min(0, math.ceil(math.log2(high) - 0.1))
    if first >= last:
        first, last = last - 1, min(0, last + 1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (first - 0.3), 2 ** (last + 0.3))
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in range(first, last + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
