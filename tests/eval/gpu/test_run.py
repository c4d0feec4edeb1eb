"""Processes that die, hang or end early, and the folder they work in."""

from __future__ import annotations

import time

import pytest
import torch
from typer.testing import CliRunner

from moa.cli.app import app
from moa.errors import MoaError, ResourceError, UsageError
from moa.eval.gpu import run
from moa.eval.gpu.bench import DeviceLost
from moa.eval.gpu.machine import Rates
from moa.eval.gpu.report import load_runs, write_report
from moa.eval.gpu.run import Settings, supervise, take_folder

CPU = torch.device("cpu")


class FakeProcess:
    """Writes `rows` bytes at its first join, then ends with `code`, or never where that is None."""

    def __init__(self, path, rows: int, code: int | None) -> None:
        self.path, self.rows, self.code, self.exitcode, self.killed = path, rows, code, None, False

    def join(self, timeout=None) -> None:
        if self.rows:
            self.path.write_bytes(self.path.read_bytes() + b"x" * self.rows if self.path.exists() else b"x" * self.rows)
            self.rows = 0
        elif not self.killed:
            self.exitcode = self.code
        if timeout:
            time.sleep(timeout)

    def kill(self) -> None:
        self.killed, self.exitcode = True, -9


def supervised(tmp_path, *ends, deadline_s=float("inf"), **options) -> list[FakeProcess]:
    started: list[FakeProcess] = []

    def start() -> FakeProcess:
        started.append(FakeProcess(tmp_path / "rows.csv", *ends[len(started)]))
        return started[-1]

    supervise(start, tmp_path / "rows.csv", deadline_s, poll_s=0.001, **options)
    return started


def test_a_process_that_dies_is_followed_by_another(tmp_path) -> None:
    assert len(supervised(tmp_path, (5, -11), (5, 1), (1, 0))) == 3


def test_a_process_that_hangs_is_killed(tmp_path) -> None:
    first, second = supervised(tmp_path, (5, None), (1, 0), stall_s=0.02)
    assert (first.killed, second.killed) == (True, False)


def test_a_process_without_a_row_ends_the_run(tmp_path) -> None:
    with pytest.raises(MoaError, match="code 1 before its first row"):
        supervised(tmp_path, (5, -11), (0, 1))


def test_processes_that_break_off_for_ever_are_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "MOST_PROCESSES", 3)
    with pytest.raises(MoaError, match="3 measuring processes broke off"):
        supervised(tmp_path, *[(5, 1)] * 4)


def test_the_deadline_ends_a_process_that_does_not_end_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "GRACE_S", 0.02)
    (only,) = supervised(tmp_path, (5, None), deadline_s=time.monotonic() + 0.01)
    assert only.killed


def test_a_folder_with_results_is_kept(tmp_path) -> None:
    take_folder(tmp_path, resume=False, overwrite=False)
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(UsageError, match=r"README\.md exists; --resume"):
        take_folder(tmp_path, resume=False, overwrite=False)
    with pytest.raises(UsageError, match="give one"):
        take_folder(tmp_path, resume=True, overwrite=True)
    take_folder(tmp_path, resume=True, overwrite=False)
    assert (tmp_path / "README.md").exists()
    take_folder(tmp_path, resume=False, overwrite=True)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_touched(tmp_path) -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        run.bench_gpu(Settings(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_command_says_what_is_wrong(tmp_path) -> None:
    out = str(tmp_path / "new")
    for arguments, said in (
        ([], "no CUDA device"),
        (["--device", "tpu"], "--device must be"),
        (["--plan", "nothing"], "NAME=FILE"),
    ):
        done = CliRunner().invoke(app, ["bench", "kernels", "-o", out, *arguments])
        assert isinstance(done.exception, UsageError)
        assert said in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_the_measuring_process_measures_and_ends_when_the_device_is_lost(tmp_path, monkeypatch) -> None:
    """All of it but the device: a CPU in its place, with rates of its own size."""
    seen = []

    class Run:
        def __init__(self, device, clock, machine, rates, file, deadline_s, tell) -> None:
            self.file = file

        def run(self, cases, subjects) -> None:
            seen.append((sum(map(len, cases)), [subject.name for subject in subjects]))
            if len(seen) > 1:
                raise DeviceLost("an illegal address")

    monkeypatch.setattr(run.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(run.torch, "device", lambda *name: CPU)
    monkeypatch.setattr(run, "measure_rates", lambda *a: Rates(1e12, 1e14, 1e-6))
    monkeypatch.setattr(run, "Bench", Run)
    monkeypatch.setattr(run.signal, "signal", lambda *a: None)
    settings = Settings(tmp_path, command="moa bench kernels")
    run.measure_all(settings, float("inf"))
    with pytest.raises(ResourceError, match="illegal address"):
        run.measure_all(settings, float("inf"))
    assert seen[0][0] > 100
    assert {"moa", "SDPA flash", "SDPA cuDNN", "flex_attention", "FlashInfer", "FlashAttention 3"} <= set(seen[0][1])
    assert [each.command for each in load_runs(tmp_path)] == ["moa bench kernels"] * 2
    write_report(tmp_path, [], load_runs(tmp_path), seen[0][0])
