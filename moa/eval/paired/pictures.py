"""Pictures of a paired evaluation, as PNG bytes; import it late, it loads matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moa.eval.figures import COLOURS, DENSE_COLOUR, MARKERS, PANEL_COLUMNS, png
from moa.eval.paired.records import DENSE, Variant
from moa.eval.paired.tables import length_label, task_label
from moa.eval.paired.view import DEPTH_BUCKETS, Cell, Mean, View
from moa.units import human_bytes

MOST_LETTERS = 32
HEAT = "cividis"
PERCENT = 100.0
Panels = Any  # an array of axes, which numpy has no type for


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, what it is called as a file, and what it shows, for who sees it and who does not."""

    name: str
    caption: str
    png: bytes


def pictures(view: View) -> Iterator[Picture]:
    """All pictures that the report has numbers for."""
    lengths = [n for n in view.lengths if n and any(v.kv_at(n) for v in view.report.variants)]
    shared = [n for n in lengths if view.shares(n)]
    bars = "with 95 % intervals." + _about_points(view)
    if shared:
        yield Picture(
            "accuracy_by_kv_bytes",
            f"Mean accuracy over tasks against KV bytes of one sequence, {bars}",
            _against_bytes(view, shared, view.mean, "mean accuracy in %", PERCENT),
        )
    for number, metric in enumerate(view.loss_metrics):
        at = [n for n in lengths if any(cell[2] == metric for cell in view.cells(n))]
        if at and view.others:
            yield Picture(
                f"loss_by_kv_bytes_{number + 1}",
                f"Loss ({metric}) above dense in nats, mean over tasks, against KV bytes of one sequence, {bars}",
                _against_bytes(view, at, _above_dense(view, metric), f"{short(metric)} above dense in nats", 1.0),
            )
    if view.with_depth:
        yield Picture(
            "accuracy_by_depth",
            "Accuracy in % by length and depth of the evidence, a panel for each way of running the model; all tasks together.",
            _depth_panels(view),
        )
    tasks = list(dict.fromkeys((task, metric) for task, _, metric in view.with_depth))
    if len(tasks) > 1:
        yield Picture(
            "accuracy_by_depth_and_task",
            "Accuracy by length (to the right) and depth (downwards), a row for each task, a column for each way.",
            _task_panels(view, tasks),
        )


def _about_points(view: View) -> str:
    apart = " Points of equal bytes stand a few per cent apart sideways." if len(view.others) > 1 else ""
    if all(variant.saves_memory for variant in view.report.variants):
        return apart
    return f"{apart} Open points only hide keys: accuracy only, memory holds the dense bytes."


def _above_dense(view: View, metric: str) -> Callable[[Variant, int], Mean | None]:
    def difference(variant: Variant, length: int) -> Mean | None:
        return Mean(0, 0, 0, 0) if variant is view.dense else view.loss_difference(variant, length, metric)

    return difference


def _against_bytes(
    view: View, lengths: Sequence[int], find: Callable[[Variant, int], Mean | None], label: str, scale: float
) -> bytes:
    columns = min(PANEL_COLUMNS, len(lengths))
    rows = -(-len(lengths) // columns)
    # a single panel is wide enough for the legend below it
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 3.3 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, n in zip(panels.flat, lengths, strict=False):
        _bytes_panel(axes, view, n, {v.name: p for v in view.report.variants if (p := find(v, n))}, scale)
    for unused in panels.flat[len(lengths) :]:
        unused.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel(label, parse_math=False)
        if scale == PERCENT:
            axes.set_ylim(-4, 104)
    _legend(figure, panels.flat[0], view)
    return _drawn(figure)


def _bytes_panel(axes: Axes, view: View, length: int, points: dict[str, Mean], scale: float) -> None:
    sizes = {v.name: size.kv_bytes for v in view.report.variants if (size := v.kv_at(length))}
    for i, variant in enumerate(view.others):
        # bars of equal bytes beside, not on top of each other
        nudge = 2 ** (0.07 * (i - (len(view.others) - 1) / 2))
        if variant.name in points and variant.name in sizes:
            _point(axes, sizes[variant.name] * nudge, points[variant.name], scale, _style(view, variant))
    if dense := points.get(DENSE):
        axes.axhline(scale * dense.value, color=DENSE_COLOUR, linestyle="--", linewidth=1.1, zorder=1)
        axes.axhspan(scale * dense.low, scale * dense.high, color=DENSE_COLOUR, alpha=0.1, linewidth=0)
        if DENSE in sizes:
            _point(axes, sizes[DENSE], dense, scale, _style(view, view.dense))
    axes.set(title=length_label(length), xlabel="KV bytes attended to")
    _bytes_axis(axes, min(sizes.values()), max(sizes.values()))
    axes.grid(alpha=0.3)


def _point(axes: Axes, kv_bytes: float, mean: Mean, scale: float, style: dict[str, str]) -> None:
    spread = np.maximum(0, [[mean.value - mean.low], [mean.high - mean.value]])
    axes.errorbar([kv_bytes], [scale * mean.value], yerr=scale * spread, capsize=3, markersize=6.5, linewidth=1.5, **style)  # type: ignore[arg-type] # fmt: skip


def _style(view: View, variant: Variant) -> dict[str, str]:
    """Colour and marker of a variant, open where it only hides keys."""
    if variant is view.dense:
        return {"color": DENSE_COLOUR, "marker": "h", "linestyle": "none"}
    i = view.others.index(variant)
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
    fill = {} if variant.saves_memory else {"markerfacecolor": "white"}
    return {"color": colour, "marker": marker, "linestyle": "none", **fill}


def _bytes_axis(axes: Axes, low: float, high: float) -> None:
    """Log scale with a tick at every doubling, labels where there is room."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(low * 2**-0.5, high * 2**0.5)
    powers = [2.0**i for i in range(64) if low * 2**-0.5 <= 2.0**i <= high * 2**0.5]
    axes.xaxis.set_major_locator(FixedLocator(powers[:: -(-len(powers) // 5)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value).replace(".00", "")))


def _legend(figure: Figure, axes: Axes, view: View) -> None:
    handles = [axes.plot([], [], markersize=6.5, **_style(view, v))[0] for v in view.report.variants]  # type: ignore[arg-type]
    labels = [short(v.name) + ("" if v.saves_memory else " (accuracy only)") for v in view.report.variants]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _depth_panels(view: View) -> bytes:
    """One panel per variant, accuracy written into its cells."""
    lengths = list(dict.fromkeys(cell[1] for cell in view.with_depth))
    variants = view.report.variants
    columns = min(PANEL_COLUMNS, len(variants))
    rows = -(-len(variants) // columns)
    width = max(2.6, 0.9 + 0.6 * len(lengths))
    figure = Figure(figsize=(1.6 + width * columns, 0.5 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, variant in zip(panels.flat, variants, strict=False):
        shares = _heat(axes, view, variant, lengths, view.with_depth)
        for (y, x), share in np.ndenumerate(shares):
            if not np.isnan(share):
                ink = "black" if share > 0.55 else "white"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_title(short(variant.name), fontsize=10, parse_math=False)
    for unused in panels.flat[len(variants) :]:
        unused.set_visible(False)
    for lowest in panels.flat[max(0, len(variants) - columns) : len(variants)]:
        lowest.tick_params(labelbottom=True)
    _depth_axes(panels, lengths)
    figure.supxlabel("length in tokens", fontsize=10)
    figure.supylabel("depth of the evidence", fontsize=10)
    _colour_bar(figure, panels)
    return _drawn(figure)


def _task_panels(view: View, tasks: Sequence[tuple[str, str]]) -> bytes:
    """A row of small panels per task."""
    lengths = list(dict.fromkeys(cell[1] for cell in view.with_depth))
    variants = view.report.variants
    width = max(1.3, 0.3 * len(lengths))
    figure = Figure(figsize=(3.4 + width * len(variants), 1.0 + 1.0 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(variants), sharex=True, sharey=True, squeeze=False)
    for row, (task, metric) in zip(panels, tasks, strict=True):
        cells = [cell for cell in view.with_depth if (cell[0], cell[2]) == (task, metric)]
        for axes, variant in zip(row, variants, strict=True):
            _heat(axes, view, variant, lengths, cells)
        name = short(task_label((task, None, metric)))
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
    for axes, variant in zip(panels[0], variants, strict=True):
        axes.set_title(short(variant.name), fontsize=9, parse_math=False)
    _depth_axes(panels, lengths, small=True)
    _colour_bar(figure, panels)
    return _drawn(figure)


def _heat(
    axes: Axes, view: View, variant: Variant, lengths: Sequence[int | None], cells: Sequence[Cell]
) -> npt.NDArray[np.float64]:
    """Draw shares by depth and length; what was not measured stays grey."""
    columns = [view.by_depth(variant, [cell for cell in cells if cell[1] == n]) for n in lengths]
    shares = np.array([[np.nan if at is None else at[0] for at in column] for column in columns]).T  # [depths, lengths]
    axes.set_facecolor("#dddddd")
    axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    return shares


def _depth_axes(panels: Panels, lengths: Sequence[int | None], *, small: bool = False) -> None:
    ends = [-0.5, DEPTH_BUCKETS / 2 - 0.5, DEPTH_BUCKETS - 0.5]
    for axes in panels[:, 0]:
        axes.set_yticks(ends, ["0 %", "50 %", "100 %"], fontsize=6 if small else 8)
    for axes in panels.flat:
        axes.set_xticks(range(len(lengths)), [f"{n:,}" if n else "any" for n in lengths], fontsize=6 if small else 8)
        axes.tick_params(axis="x", rotation=45 if len(lengths) > 3 else 0)


def _colour_bar(figure: Figure, panels: Panels) -> None:
    scale = ScalarMappable(cmap=HEAT)
    scale.set_clim(0, 100)
    figure.colorbar(scale, ax=list(panels.flat), label="accuracy in %", fraction=0.04)


def short(name: str) -> str:
    """A name on one line, cut where it is long."""
    line = " ".join(name.split())
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 1] + "…"


def _drawn(figure: Figure) -> bytes:
    """The PNG; letters that no font has are drawn as boxes, which is not worth a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return png(figure)
