"""What this process holds of the machine's memory, now and at most, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from moa.errors import ResourceError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held_bytes() -> int:
    """Bytes of physical memory that this process holds now; raises ResourceError where Linux does not tell."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most that it held since `reset_peak`, or ever; raises ResourceError where Linux does not tell."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Count the peak from now on; raises ResourceError where that is not to be had, and the peak stays what it was."""
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError as error:
        raise ResourceError(
            f"peak memory cannot be reset ({error}); run this on Linux, as the process's owner"
        ) from None


def give_back() -> None:
    """Give what is free back to the system, so that all that is measured starts from the same."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int:
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    kib = next((line.split()[1] for line in lines if line.startswith(f"{key}:")), None)
    if kib is None:
        raise ResourceError(f"memory of a process is read from {STATUS}, which says no {key} here; run this on Linux")
    return int(kib) * 1024
