"""Pictures of a run: prefill's rate over the length, decode's share of the copy rate over the bytes it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moa.eval.figures import COLOURS, MARKERS, png
from moa.eval.gpu.rows import Row, latest


def prefill_picture(rows: Sequence[Row]) -> bytes | None:
    """PNG of TFLOP/s over prompt lengths, without a plan and with MoA's rules, ours and peers; None without rows."""
    mine = [row for row in latest(list(rows)) if row.kind == "prefill" and row.status == "ok" and row.batch == 1]
    plans = [plan for plan in ("dense", "MoA rules") if any(row.plan == plan for row in mine)]
    if not plans:
        return None
    heads = mine[0].heads
    figure = Figure(figsize=(4.8 * len(plans), 4.2), layout="constrained")
    for axes, plan in zip(figure.subplots(1, len(plans), squeeze=False)[0], plans, strict=True):
        here = [row for row in mine if row.plan == plan and row.heads == heads]
        _lines(axes, here, lambda row: row.tokens, lambda row: row.tflops or 0)
        lengths = sorted({row.tokens for row in here})
        axes.set(xscale="log", xlabel="tokens", ylabel="TFLOP/s of kept pairs", title=f"{heads}, {plan}")
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    return png(figure)


def decode_picture(rows: Sequence[Row]) -> bytes | None:
    """PNG of the share of the measured copy rate over the bytes of keys and values read; None without rows."""
    mine = [row for row in latest(list(rows)) if row.kind == "decode" and row.status == "ok" and row.kv == "bf16"]
    if not mine:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    _lines(axes, mine, lambda row: (row.kv_bytes or 0) / 1e6, lambda row: 100 * (row.of_copy_ratio or 0), joined=False)
    axes.axhline(100, color="#555555", linewidth=1)
    axes.set(xscale="log", xlabel="keys and values, MB", ylabel="% of the measured copy rate", title="Decode, bfloat16")
    axes.set_ylim(bottom=0)
    return png(figure)


def _lines(
    axes: Axes, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float], joined: bool = True
) -> None:
    for i, subject in enumerate(dict.fromkeys(row.subject for row in rows)):
        mine = sorted((row for row in rows if row.subject == subject), key=x)
        axes.plot(
            [x(row) for row in mine],
            [y(row) for row in mine],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="-" if joined else "",
            label=subject,
        )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
