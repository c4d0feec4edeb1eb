"""One run per folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import weakref
from datetime import UTC, datetime
from pathlib import Path

from moa.errors import UsageError

LOCK_NAME = ".moa.lock"
# NFS without its lock service, and file systems that know no locks
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
log = logging.getLogger("moa")


class FolderLock:
    """Held until the last reference to it goes, or the process ends; made by `lock_folder`."""

    def __init__(self, file: Path) -> None:
        self._release = weakref.finalize(self, _unlock, file, _locked_handle(file), os.getpid())

    def release(self) -> None:
        """Let others in; repeating it changes nothing."""
        self._release()


_held: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()
_taking = threading.Lock()


def lock_folder(folder: Path) -> FolderLock:
    """Keep other processes' runs out of a folder; within one process all holders share the lock.

    The kernel drops the lock of a process that was killed, so none is ever stale. Where the file system knows no locks,
    a warning says so and nobody is kept out.

    Raises:
        UsageError: another process has it; names the process.
        OSError: the folder cannot be written to.
    """
    file = folder.resolve() / LOCK_NAME
    with _taking:
        lock = _held.get(file)
        if lock is None or not lock._release.alive:
            lock = _held[file] = FolderLock(file)
    return lock


def _locked_handle(file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in UNSUPPORTED:
                log.warning("%s cannot be locked (%s); see that no other run uses it", file.parent, error.strerror)
                return os.open(os.devnull, os.O_RDONLY)
            raise UsageError(
                f"{file.parent} is in use by another run ({holder or 'holder unknown'}); "
                "wait until it has ended, or name another folder"
            ) from None
        if _is_same(handle, file):
            break
        os.close(handle)  # its holder removed the file just before we got the lock on it
    with contextlib.suppress(OSError):  # for the message alone; a full disk is found out elsewhere
        os.ftruncate(handle, 0)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode(), 0)
    return handle


def _is_same(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _unlock(file: Path, handle: int, owner: int) -> None:
    if os.getpid() == owner and _is_same(handle, file):  # a forked child leaves its parent's file alone
        file.unlink(missing_ok=True)
    os.close(handle)
