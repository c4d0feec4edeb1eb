"""The exception tree; each class carries the command line's exit code.

MoaError (1)
 +-- UsageError (2)        an option or argument that cannot be meant
 +-- InputError (3)        a file, model or data set that cannot be used
 |    +-- PlanError        a plan that is not one, or not for this model
 |    +-- ProfileError     likewise for a profile
 |    +-- ModelError       a directory that is no model, or a model that cannot be compressed
 |    +-- DataError        calibration or evaluation data
 |    +-- HubError         a repository that is not there or cannot be reached
 +-- InfeasibleError (1)   no plan can keep the budget
 +-- ResourceError (4)     out of memory, disk or time
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class MoaError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 1


class UsageError(MoaError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class InputError(MoaError):
    """A file, model or data set that cannot be used."""

    exit_code = 3


class PlanError(InputError):
    """A plan that is not one, or not for this model."""


class ProfileError(InputError):
    """A profile that is not one, or not for this model."""


class ModelError(InputError):
    """A directory that is no model, or a model that cannot be compressed."""


class DataError(InputError):
    """Calibration or evaluation data that cannot be used."""


class HubError(InputError):
    """A hub repository that is not there, cannot be used or cannot be reached."""


class InfeasibleError(MoaError):
    """No plan can keep the budget."""


class ResourceError(MoaError):
    """Out of memory, disk or time."""

    exit_code = 4


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# EFBIG: the process may write no larger file (ulimit -f)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shortage(error: BaseException) -> ResourceError | None:
    """What ran out, as an error that says so, or None where the exception means something else."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{where}the disk is full; free some room and run the command again")
    # by name, because torch must not be imported for an error that is not its own
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return ResourceError(f"the device is out of memory; try a shorter length or a smaller batch ({error})")
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    # torch's CPU allocator, and mmap of a weights file
    told = isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "Cannot allocate memory" in str(error)
    )
    if isinstance(error, MemoryError) or refused or told:
        return ResourceError("out of memory; try a shorter length or a smaller batch")
    return None
