"""The exception tree; each class carries the command line's exit code.

MoaError (1)
 +-- UsageError (2)        an option or argument that cannot be meant
 +-- InputError (3)        a file, model or data set that cannot be used
 |    +-- PlanError        a plan that is not one, or not for this model
 |    +-- ProfileError     likewise for a profile
 |    +-- ModelError       a directory that is no model, or a model that cannot be compressed
 |    +-- DataError        calibration or evaluation data
 +-- InfeasibleError (1)   no plan can keep the budget
 +-- ResourceError (4)     out of memory, disk or time
"""

from __future__ import annotations

import difflib
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


class InfeasibleError(MoaError):
    """No plan can keep the budget."""


class ResourceError(MoaError):
    """Out of memory, disk or time."""

    exit_code = 4


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
