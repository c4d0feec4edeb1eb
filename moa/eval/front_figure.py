"""The picture of a front over budgets; import it late, it loads matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moa.eval.figures import COLOURS, DENSE_COLOUR, DPI, MARKERS
from moa.eval.front import BASELINES, BUDGETS, LENGTHS, FrontPoint
from moa.eval.labels import percent
from moa.plan import Plan
from moa.units import human_bytes


def front_picture(points: Sequence[FrontPoint], chosen: Plan) -> bytes:
    """PNG of predicted loss against density, and of what the plans at the asked density trade between the lengths.

    The upper axis says the KV bytes per token that a density means. Losses are relative to the best single rule's at the
    asked density; dense loses nothing, which a logarithmic axis shows as its lower edge.
    """
    between = [point for point in points if point.sweep == LENGTHS]
    figure = Figure(figsize=(10.5 if len(between) > 1 else 6.2, 4.8), layout="constrained")
    panels = figure.subplots(1, 2 if len(between) > 1 else 1, squeeze=False)[0]
    _budgets(panels[0], points, chosen)
    if len(between) > 1:
        _lengths(panels[1], between, chosen)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _budgets(axes: Axes, points: Sequence[FrontPoint], chosen: Plan) -> None:
    for i, name in enumerate((BUDGETS, *BASELINES)):
        curve = [(_density(p.plan), p.value) for p in points if p.sweep == name]
        label = "moa" if name == BUDGETS else name
        if curve:
            axes.plot(
                *zip(*sorted(curve), strict=True), color=COLOURS[i], marker=MARKERS[i], markersize=5, label=label,
                linewidth=1.8 if name == BUDGETS else 1.2, zorder=4 - (i > 0),
            )  # fmt: skip
    at = [p for p in points if p.plan.rules == chosen.rules][:1]
    if at:
        axes.scatter(
            _density(chosen), at[0].value, color=COLOURS[1], marker="*", s=240, edgecolor="black", zorder=5,
            label="the run's plan",
        )  # fmt: skip
    dense = next(p for p in points if p.sweep == "dense")
    axes.scatter(1.0, 0.0, color=DENSE_COLOUR, marker="X", s=90, zorder=5, label="dense, loss 0", clip_on=False)
    positive = [p.value for p in points if p.value > 0] or [1.0]
    axes.set_yscale("symlog", linthresh=min(positive), linscale=0.3)
    axes.set_ylim(0, 1.5 * max(positive))
    axes.set_xscale("log", base=2)
    low = min(_density(p.plan) for p in points)
    ticks = [2.0**-i for i in range(12) if 2.0**-i >= 0.8 * low]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    _bytes_axis(axes, ticks, dense.plan)
    length = dense.plan.lengths[0].length_tokens
    axes.set(
        xlabel=f"density at {length:,} tokens",
        ylabel="predicted loss (best single rule at the asked density: 1)",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def _bytes_axis(axes: Axes, ticks: Sequence[float], dense: Plan) -> None:
    per_token = dense.lengths[0].kv_bytes_per_token
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator(list(ticks)))
    top.xaxis.set_minor_locator(NullLocator())
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value * per_token)))
    top.set_xlabel("KV cache per token")


def _lengths(axes: Axes, points: Sequence[FrontPoint], chosen: Plan) -> None:
    """Loss at the longest evaluated length against loss at the shortest."""
    at = points[0].plan.lengths[: len(points[0].losses)]
    first, last = ([p.losses[i] for p in points] for i in (0, -1))
    axes.scatter(first, last, color=COLOURS[0], s=42, label="plan at the asked density", zorder=3)
    mine = [p for p in points if p.plan.rules == chosen.rules][:1]
    for p in mine:
        axes.scatter(
            p.losses[0], p.losses[-1], color=COLOURS[1], marker="*", s=240, edgecolor="black", zorder=4,
            label="the run's plan",
        )  # fmt: skip
    axes.set(
        xlabel=f"predicted loss at {at[0].length_tokens:,} tokens",
        ylabel=f"predicted loss at {at[-1].length_tokens:,} tokens",
        title=f"Between lengths, at a density of {percent(points[0].density_budget_ratio)}",
    )
    axes.margins(0.15)
    axes.locator_params(nbins=5)
    axes.ticklabel_format(style="scientific", scilimits=(-2, 4))
    axes.grid(alpha=0.3)
    axes.legend()


def _density(plan: Plan) -> float:
    return plan.lengths[0].density_ratio
