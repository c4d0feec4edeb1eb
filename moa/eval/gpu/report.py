"""What a run of the kernels' benchmark writes beside its rows: a page with tables and verdicts, and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa.errors import InputError
from moa.eval.gpu.machine import Machine, Rates
from moa.eval.gpu.pictures import decode_picture, prefill_picture
from moa.eval.gpu.rows import STATUS, Row, latest
from moa.eval.gpu.targets import OURS, PLANNER, TARGETS, Verdict, ideal_gain, judge
from moa.eval.labels import percent
from moa.eval.markdown import NOT_MEASURED, table
from moa.files import write_atomic
from moa.units import human_bytes

ROWS_NAME, RUNS_NAME = "rows.csv", "runs.json"
TITLES = {
    "prefill": "Prefill",
    "chunk": "Chunks of prompts",
    "decode": "Decode",
    "hybrid": "Prompts and decodes at once",
}
MASKS = {
    "same": "the plan's mask",
    "dense": "all causal keys",
    "equal length": "one window for all heads, as long as the plan's mean span, no sinks",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One process's share of the measuring: when it began, the command, the machine and its rates then."""

    date: str
    command: str
    machine: Machine
    rates: Rates


def save_runs(folder: Path, runs: Sequence[Run]) -> None:
    """Write the runs beside the rows."""
    write_atomic(folder / RUNS_NAME, json.dumps([asdict(run) for run in runs], indent=2).encode() + b"\n")


def load_runs(folder: Path) -> list[Run]:
    """The runs so far; none if there is no such file.

    Raises:
        InputError: the file is of another form.
    """
    path = folder / RUNS_NAME
    if not path.exists():
        return []
    try:
        return [_run(item) for item in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not the runs of a benchmark ({error}); name another folder") from None


def _run(item: dict[str, Any]) -> Run:
    machine = item["machine"]
    versions = tuple((str(name), str(number)) for name, number in machine["versions"])
    return Run(item["date"], item["command"], Machine(**machine | {"versions": versions}), Rates(**item["rates"]))


def write_report(folder: Path, rows: Sequence[Row], runs: Sequence[Run], cases: int) -> None:
    """Write README.md and the pictures, each atomically.

    Args:
        folder: where the rows are.
        rows: all rows.
        runs: who measured them, at least one.
        cases: cases of the grid.
    """
    pictures = {"prefill.png": prefill_picture(rows), "decode.png": decode_picture(rows)}
    shown = []
    for name, picture in pictures.items():
        if picture is not None:
            write_atomic(folder / name, picture)
            shown.append(name)
    write_atomic(folder / "README.md", page(rows, runs, cases, shown).encode())


def summary(rows: Sequence[Row]) -> str:
    """The verdicts and tables alone."""
    counting = list(latest(list(rows)))
    return "\n\n".join([verdicts(judge(counting)), *tables(counting)])


def page(rows: Sequence[Row], runs: Sequence[Run], cases: int, pictures: Sequence[str] = ()) -> str:
    """The README of a results folder."""
    counting = list(latest(list(rows)))
    parts = [
        "# Attention kernels on a GPU",
        "\n".join(f"- {line}" for line in conditions(runs)),
        "## Targets",
        "Levels are for one NVIDIA H200; the worst case counts. The figure is that case's.",
        verdicts(judge(counting)),
        "## Coverage",
        "\n".join(f"- {line}" for line in coverage(counting, cases)),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        *tables(counting),
        *_failures(counting),
        "## How to read this",
        READING,
    ]
    return "\n\n".join(parts) + "\n"


READING = """Times are medians over turns through all buffer sets, with the 20th and 80th percentile in brackets; together the
sets are more than three times the L2 cache, so every call finds it cold. Inputs are normal random numbers in bfloat16.
Below a millisecond, calls are replayed from a CUDA graph where they can be recorded. TFLOP/s counts the query-key pairs
that a subject's own mask keeps, GB/s the keys and values that it has to read; "of matmul" and "of copy" are shares of what
the same process measured for an 8192-cubed product and for a copy of 2 GiB (bytes read plus bytes written). Before it is
timed, every row of small cases of our kernels, and rows of first and last buffers of every case and subject, are held
against float64. A peer's column is its time over ours: above 1 we are faster. Peers marked dense do all the work that a plan
leaves out."""


def conditions(runs: Sequence[Run]) -> Iterator[str]:
    """Lines that say on what, with what and when."""
    machine = runs[-1].machine
    yield (
        f"{machine.device}, compute capability {machine.capability}, {machine.multiprocessors} multiprocessors, "
        f"L2 {human_bytes(machine.l2_bytes)}, memory {human_bytes(machine.memory_bytes)}"
    )
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions)
    yield f"driver {machine.driver or 'unknown'}, CUDA {machine.cuda}, Python {machine.python}, {versions}"
    for run in runs:
        rates = run.rates
        yield (
            f"{run.date}, `{run.command}`: copy {rates.copy_bytes_per_s / 1e12:.2f} TB/s, "
            f"matmul {rates.matmul_flops_per_s / 1e12:.0f} TFLOP/s, a launch in a graph {rates.launch_s * 1e6:.2f} µs"
        )


def verdicts(found: Sequence[Verdict]) -> str:
    """The targets as a table."""
    headings = ("target", "minimum", "good", "stretch", "measured", "verdict", "cases", "worst case")
    lines = []
    for verdict in found:
        target, worst = verdict.target, verdict.worst
        levels = [f"{x:g}" for x in (target.minimum, target.good, target.stretch)]
        figure = f"{worst.value:.3g} {target.unit}" if worst else NOT_MEASURED
        lines.append(
            (target.name, *levels, figure, verdict.verdict, str(verdict.cases), worst.case if worst else NOT_MEASURED)
        )
    return table(headings, lines)


def coverage(rows: Sequence[Row], cases: int) -> Iterator[str]:
    """How much of the grid there is, and what became of each subject."""
    done = {row.case for row in rows if row.subject == OURS and row.status == "ok"}
    yield f"cases of the grid with a time of ours: {len(done)} of {cases}"
    missing = [target.name for target in TARGETS if not list(target.find(list(rows)))]
    yield "targets not measured: " + ("; ".join(missing) if missing else "none")
    for subject in dict.fromkeys(row.subject for row in rows):
        mine = [row for row in rows if row.subject == subject]
        counts = {s: sum(r.status == s for r in mine) for s in STATUS}
        said = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
        reasons = {row.reason for row in mine if row.status == "missing"}
        why = f" ({min(reasons)})" if reasons else ""
        yield f"{subject}, {MASKS[mine[0].mask]}: {said}{why}"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A heading and a table for every kind of step that was measured."""
    for kind, title in TITLES.items():
        mine = [row for row in rows if row.kind == kind]
        if mine:
            yield f"## {title}"
            yield kind_table(mine, rows)


def kind_table(rows: Sequence[Row], everything: Sequence[Row]) -> str:
    """Ours with its rates, and the ratio of every peer; a word where there is none."""
    peers = [name for name in dict.fromkeys(row.subject for row in rows) if name not in (OURS, PLANNER)]
    peers = [name for name in peers if any(r.subject == name and r.status != "missing" for r in rows)]
    ideal = ("ideal gain",) if rows[0].kind == "hybrid" else ()
    headings = ("case", "kept", "µs", "TFLOP/s", "of matmul", "GB/s", "of copy", *ideal, *peers)
    lines = []
    for name in dict.fromkeys(row.case for row in rows):
        here = {row.subject: row for row in rows if row.case == name}
        ours = here.get(OURS)
        gain = (_number(ideal_gain(everything, ours)),) if ideal and ours else ideal and (NOT_MEASURED,)
        lines.append((*_ours(name, ours), *gain, *(_ratio(ours, here.get(peer)) for peer in peers)))
    return table(headings, lines)


def _ours(name: str, row: Row | None) -> tuple[str, ...]:
    if row is None or row.median_us is None:
        return name, NOT_MEASURED, row.status if row else NOT_MEASURED, *(NOT_MEASURED,) * 4
    kept = (row.flops or 0) / (row.dense_flops or 1)
    low, high = _time(row.low_us or 0), _time(row.high_us or 0)
    return (
        name, percent(kept), f"{_time(row.median_us)} ({low} to {high})", f"{row.tflops:.0f}",
        percent(row.of_matmul_ratio or 0), f"{row.gb_per_s:,.0f}", percent(row.of_copy_ratio or 0),
    )  # fmt: skip


def _time(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def _ratio(ours: Row | None, peer: Row | None) -> str:
    if peer is None:
        return NOT_MEASURED
    if peer.median_us is None:
        return peer.status
    if ours is None or ours.median_us is None:
        return f"{_time(peer.median_us)} µs"
    return _number(peer.median_us / ours.median_us)


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    """Each reason once, with how often it came and one case of it."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status in ("failed", "wrong", "unsupported") or (row.status == "ok" and row.reason):
            seen.setdefault((row.subject, row.status, row.reason), []).append(row.case)
    if seen:
        yield "## What has no figure, or has a remark"
        yield table(
            ("subject", "status", "reason", "cases", "for example"),
            [(*key, str(len(found)), found[0]) for key, found in seen.items()],
        )
