"""Mixed steps of our Triton kernels: prompts and decodes in one launch, and the two launches that it is held against.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.own_pages import ready_layers, run_layers, unpack_parts
from moa.eval.gpu.subject import Built
from moa.eval.gpu.targets import OURS, SERIAL, TICKETS
from moa.eval.gpu.work import Mask

NAMES = {"spread": OURS, "tickets": TICKETS, "serial": SERIAL}


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mixed step: decodes spread among prefill tiles, drawn by tickets, or one launch after the other.

    Both sides run with the tiles that the device's table has for it, which are smaller in one launch than in two.
    """

    how: Literal["spread", "tickets", "serial"]
    mask: Mask = "same"
    needs_s: float = 4.0
    is_ours: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As in tables."""
        return NAMES[self.how]

    def missing(self) -> str | None:
        """It comes with moa."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Steps of one kind."""
        return None if case.kind == "hybrid" else "measured for mixed steps only"

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Pages, work lists and room for partial results of all layers."""
        kv, ready = ready_layers(case, inputs, self.how)
        return Built(run_layers(ready), unpack_parts(case), kv.kv_bytes // len(inputs))
