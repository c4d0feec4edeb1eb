"""Pictures of `moa bench context`, as PNG bytes; import it late, it loads matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moa.eval.bench_context import CARRIED, EFFECTIVE, FIXED, PLAN, REPLANNED, SEARCH, SEARCHES, SHARE, UNIFORM
from moa.eval.effective_context import RECALL_LEVEL, ContextRow, over_seeds
from moa.eval.figures import COLOURS, DENSE_COLOUR, MARKERS, png
from moa.eval.labels import percent
from moa.eval.records import DENSE

Rows = Sequence[ContextRow]
# A method has one colour and marker in all pictures; no picture has two of one number.
STYLES = {UNIFORM: 0, SHARE: 0, PLAN: 1, "elastic": 1, FIXED: 2, REPLANNED: 3, "layers": 4}


def effective_picture(rows: Rows) -> bytes:
    """PNG of recall against length, a panel per average span."""
    mine = [row for row in rows if row.experiment == EFFECTIVE]
    spans = sorted({row.budget for row in mine if row.budget is not None})
    figure, panels = _panels(len(spans))
    for axes, span in zip(panels, spans, strict=True):
        axes.axhline(100 * RECALL_LEVEL, color="#bbbbbb", linewidth=1)
        axes.axvline(span, color="#bbbbbb", linewidth=1, linestyle=":")
        _length_axis(axes, mine, f"average span {span:g} tokens")
        _lines(axes, [row for row in mine if row.budget in (None, span)], (UNIFORM, PLAN))
    return _finished(figure, panels)


def search_picture(rows: Rows) -> bytes:
    """PNG of recall against density, a panel per length."""
    mine = [row for row in rows if row.experiment == SEARCH]
    lengths = sorted({row.length_tokens for row in mine})
    densities = sorted({row.budget for row in mine if row.budget is not None})
    figure, panels = _panels(len(lengths))
    for axes, n in zip(panels, lengths, strict=True):
        here = [row for row in mine if row.length_tokens == n]
        for i, method in enumerate((UNIFORM, *SEARCHES)):
            cells = [[row for row in here if row.method == method and row.budget == d] for d in densities]
            _line(axes, [d * 2 ** (0.04 * (i - 1.5)) for d in densities], cells, method)
        dense = [row for row in here if row.method == DENSE]
        axes.axhline(100 * over_seeds(dense)[0], color=DENSE_COLOUR, linestyle="--", label=DENSE)
        axes.set_xscale("log", base=2)
        axes.set_xticks(densities, [percent(d) for d in densities])
        axes.set(title=f"{n:,} tokens", xlabel="density", ylim=(-3, 105))
        axes.grid(alpha=0.3)
    return _finished(figure, panels)


def carried_picture(rows: Rows) -> bytes:
    """PNG of recall against length of plans made at short ones, a panel per budget; profiled lengths lie on grey."""
    mine = [row for row in rows if row.experiment == CARRIED]
    budgets = sorted({row.budget for row in mine if row.budget is not None})
    profiled = max(row.longest_profiled or 0 for row in mine)
    figure, panels = _panels(len(budgets))
    for axes, budget in zip(panels, budgets, strict=True):
        _length_axis(axes, mine, f"budget {percent(budget)}")
        axes.axvspan(axes.get_xlim()[0], profiled, color="#eeeeee", zorder=0)
        _lines(axes, [row for row in mine if row.budget in (None, budget)], (SHARE, FIXED, "elastic", REPLANNED))
    return _finished(figure, panels)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * max(2, count), 4.0), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _length_axis(axes: Axes, rows: Rows, title: str) -> None:
    lengths = sorted({row.length_tokens for row in rows})
    ticks = [n for n in lengths if n & (n - 1) == 0] or lengths
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.1, lengths[-1] * 1.1)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize="small")
    axes.set(title=title, xlabel="tokens of the text", ylim=(-3, 105))
    axes.grid(alpha=0.3)


def _lines(axes: Axes, rows: Rows, methods: Sequence[str]) -> None:
    """Dense and the methods, by length."""
    for method in (DENSE, *methods):
        mine = [row for row in rows if row.method == method]
        lengths = sorted({row.length_tokens for row in mine})
        _line(axes, lengths, [[row for row in mine if row.length_tokens == n] for n in lengths], method)


def _line(axes: Axes, at: Sequence[float], cells: Sequence[Rows], method: str) -> None:
    shares = [[100 * share for share in over_seeds(rows)] for rows in cells]
    means = [mean for mean, _, _ in shares]
    below, above = ([abs(ends[i] - ends[0]) for ends in shares] for i in (1, 2))
    index = STYLES.get(method, 0)
    style = (DENSE_COLOUR, "", "--") if method == DENSE else (COLOURS[index], MARKERS[index], "-")
    axes.errorbar(
        at, means, yerr=[below, above], label=method, capsize=2, markersize=4.5, linewidth=1.4,
        color=style[0], marker=style[1], linestyle=style[2],
    )  # fmt: skip


def _finished(figure: Figure, panels: Sequence[Axes]) -> bytes:
    panels[0].set_ylabel("right answers, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return png(figure)
