"""Measuring in a process of its own, watched from outside: a kernel that crashes, hangs or loses the device costs its row."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from moa.errors import MoaError, ResourceError, UsageError
from moa.eval.gpu.bench import Bench, DeviceLost
from moa.eval.gpu.cases import Case, tiers
from moa.eval.gpu.heads import HeadShape
from moa.eval.gpu.machine import describe, measure_rates, now
from moa.eval.gpu.patterns import Pattern, from_file
from moa.eval.gpu.report import ROWS_NAME, RUNS_NAME, Run, load_runs, save_runs, write_report
from moa.eval.gpu.rows import Row, RowFile, read_rows
from moa.eval.gpu.subjects import all_subjects
from moa.eval.gpu.timing import CudaClock

# No row takes longer than this, compilation included, unless something hangs.
STALL_S = 300.0
# Processes that a run may lose.
MOST_PROCESSES = 40
# What is left of a budget for rows under way and the report, once it is used up.
GRACE_S = 20.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, and for how long.

    Args:
        folder: where rows, report and pictures go.
        budget_minutes: no case begins that would not be done by then; None for no limit.
        plans: (head shape, file) of plans to measure beside MoA's rules.
        command: what was typed, for the report.
    """

    folder: Path
    budget_minutes: float | None = None
    plans: tuple[tuple[str, Path], ...] = ()
    command: str = ""

    def tiers(self) -> list[list[Case]]:
        """The cases; raises for plans that cannot be read."""
        plans: list[tuple[HeadShape, Pattern]] = [from_file(name, path) for name, path in self.plans]
        return tiers(plans)


class Process(Protocol):
    """What is needed of a `multiprocessing.Process` that has been started."""

    @property
    def exitcode(self) -> int | None:
        """What it ended with, None while it runs."""

    def join(self, timeout: float | None = None) -> None:
        """Wait."""

    def kill(self) -> None:
        """End it."""


def bench_gpu(settings: Settings, *, resume: bool = False, overwrite: bool = False) -> list[Row]:
    """Measure on the current CUDA device, and write rows.csv, runs.json, README.md and pictures.

    Raises:
        UsageError: there is no such device, or the folder holds results and neither `resume` nor `overwrite` was given.
        InputError: a plan or what an earlier run left cannot be read.
        MoaError: the measuring process ended without a single row.
    """
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device is there to measure on; --device cpu measures the torch backend instead")
    cases = settings.tiers()
    take_folder(settings.folder, resume=resume, overwrite=overwrite)
    deadline_s = float("inf")
    if settings.budget_minutes is not None:
        deadline_s = time.monotonic() + 60 * settings.budget_minutes - GRACE_S
    supervise(lambda: _start(settings, deadline_s), settings.folder / ROWS_NAME, deadline_s)
    file = RowFile(settings.folder / ROWS_NAME)
    file.compact()
    write_report(settings.folder, file.rows, load_runs(settings.folder), sum(map(len, cases)))
    return file.rows


def take_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder, or take over what an earlier run left.

    Raises:
        UsageError: both were asked for, or results are there and neither was.
        InputError: with `resume`, what is there cannot be read.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps what is there and --overwrite deletes it; give one of them")
    folder.mkdir(parents=True, exist_ok=True)
    held = [folder / name for name in (ROWS_NAME, RUNS_NAME, "README.md") if (folder / name).exists()]
    if held and not (resume or overwrite):
        raise UsageError(f"{held[0]} exists; --resume goes on from there, --overwrite starts anew")
    if overwrite:
        for path in held:
            path.unlink()
    elif (folder / ROWS_NAME).exists():
        read_rows(folder / ROWS_NAME)
        load_runs(folder)


def supervise(
    start: Callable[[], Process], rows: Path, deadline_s: float, stall_s: float = STALL_S, poll_s: float = 0.5
) -> None:
    """Run processes until one gets through; a new one goes on where the last one broke off.

    Args:
        start: begins a process.
        rows: the file that grows while it works.
        deadline_s: when it should have ended by itself, `time.monotonic()`.
        stall_s: after so long without a new row a process hangs, and is killed.
        poll_s: how often to look.

    Raises:
        MoaError: a process ended early without a new row, or too many ended early.
    """
    for _ in range(MOST_PROCESSES):
        before = _size(rows)
        code = _watch(start(), rows, deadline_s, stall_s, poll_s)
        if code == 0 or time.monotonic() > deadline_s:
            return
        if _size(rows) == before:
            raise MoaError(f"the measuring process ended with code {code} before its first row; its output says why")
    raise MoaError(f"{MOST_PROCESSES} measuring processes broke off; their output says why, --resume goes on")


def _watch(process: Process, rows: Path, deadline_s: float, stall_s: float, poll_s: float) -> int:
    size, changed_s = _size(rows), time.monotonic()
    try:
        while process.exitcode is None:
            process.join(poll_s)
            now_s = time.monotonic()
            if _size(rows) != size:
                size, changed_s = _size(rows), now_s
            if now_s - changed_s > stall_s or now_s > deadline_s + GRACE_S / 2:
                process.kill()
                process.join()
    finally:
        if process.exitcode is None:
            process.kill()
    return process.exitcode or 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _start(settings: Settings, deadline_s: float) -> Process:
    # spawned: a forked process could not use CUDA
    process = multiprocessing.get_context("spawn").Process(target=measure_all, args=(settings, deadline_s))
    process.start()
    return process


def measure_all(settings: Settings, deadline_s: float) -> None:
    """The measuring process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports an interrupt
    device, clock = torch.device("cuda", torch.cuda.current_device()), CudaClock()
    file = RowFile(settings.folder / ROWS_NAME)
    machine = describe(device)
    file.check_device(machine.device)
    run = Run(now(), settings.command, machine, measure_rates(device, clock))
    save_runs(settings.folder, [*load_runs(settings.folder), run])
    bench = Bench(device, clock, machine, run.rates, file, deadline_s, tell=tell)
    try:
        bench.run(settings.tiers(), all_subjects(device))
    except DeviceLost as error:
        raise ResourceError(f"the device is unusable after that: {error}; measuring goes on in a new process") from None


def tell(row: Row) -> None:
    """One line on stderr per row."""
    said = f"{row.median_us:,.1f} µs" if row.median_us is not None else f"{row.status}: {row.reason}"
    sys.stderr.write(f"{row.case}, {row.subject}: {said}\n")
    sys.stderr.flush()
