"""Processes that die, hang or end early, and the folder they work in."""

from __future__ import annotations

import time

import pytest
import torch

from moa.errors import MoaError, UsageError
from moa.eval.gpu import run
from moa.eval.gpu.run import Settings, supervise, take_folder


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
