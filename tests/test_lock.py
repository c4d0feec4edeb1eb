"""Two processes never share a folder, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa.errors import UsageError
from moa.lock import LOCK_NAME, lock_folder

HOLD = """
import sys
from pathlib import Path
from moa.lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until its stdin is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path, holder) -> None:
    with pytest.raises(UsageError, match=rf"in use by another run \(process {holder.pid} on .*UTC\); wait until"):
        lock_folder(tmp_path)
    holder.communicate()
    assert list(tmp_path.iterdir()) == []
    lock_folder(tmp_path)


def test_a_killed_holder_leaves_no_lock(tmp_path: Path, holder) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    lock_folder(tmp_path)


def test_one_process_shares_its_lock_until_the_last_holder_goes(tmp_path: Path) -> None:
    first, second = lock_folder(tmp_path), lock_folder(tmp_path / "../" / tmp_path.name)
    assert first is second
    del first
    gc.collect()
    assert (tmp_path / LOCK_NAME).exists()
    del second
    gc.collect()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    lock.release()
    lock.release()
    again = lock_folder(tmp_path)
    assert again is not lock
    assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} ")


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch, caplog) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = lock_folder(tmp_path)
    assert "cannot be locked (No locks available)" in caplog.text
    lock.release()
