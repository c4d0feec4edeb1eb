"""A file is whole or not there."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from moa.errors import InputError, ResourceError
from moa.files import write_atomic


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "plan.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_takes_the_usual_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, code):
    path = tmp_path / "plan.json"
    write_atomic(path, b"old")

    def full(_handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "plan.json", b"new")
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"taken.plan\.json: cannot be written"):
        write_atomic(tmp_path / "taken" / "plan.json", b"")


def test_a_folder_where_a_file_is_wanted(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "plan.json", b"")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    sync = os.fsync

    def no_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    write_atomic(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
