"""What is measured: our kernels and their peers behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.timing import Call, first_line
from moa.eval.gpu.work import Mask


@dataclass(frozen=True, slots=True)
class Built:
    """A subject ready to run a case.

    Args:
        calls: one per set of buffers; each runs the whole step.
        outputs: what a call returned, as [S, C, HQ, D] per part of the case.
        stored_kv_bytes: bytes of key and value storage of one set, where the subject keeps its own.
        error: how far a result that is no attention is off; None for attention, which is compared with float64.
    """

    calls: tuple[Call, ...]
    outputs: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    stored_kv_bytes: int | None = None
    error: Callable[[], float] | None = None


class Subject(Protocol):
    """A kernel or library.

    `needs_s` is what it takes to get ready, compilation included, as a budget reckons with it. `is_ours` has it checked
    at small sizes as well.
    """

    @property
    def name(self) -> str:
        """As in tables."""

    @property
    def mask(self) -> Mask:
        """What it computes."""

    @property
    def needs_s(self) -> float:
        """Seconds to get ready for a case."""

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine, None if it can."""

    def refuses(self, case: Case) -> str | None:
        """Why it has no answer to a case, None if it has."""

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Get ready; whatever goes wrong may be raised, it ends up as the reason in the table."""


def why_not(package: str) -> str | None:
    """Why a package cannot be imported, None if it can; its import may fail in any way, for want of a library say."""
    if find_spec(package) is None:
        return "not installed"
    try:
        import_module(package)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
        return f"cannot be imported: {first_line(error)}"
    return None
