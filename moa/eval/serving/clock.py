"""Time as a load generator needs it: to read, and to let pass."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds."""

    def __call__(self) -> float:
        """Now."""

    def wait_until(self, at_s: float) -> None:
        """Come back at that time, or at once if it is past."""


class WallClock:
    """The machine's time."""

    def __call__(self) -> float:
        return time.monotonic()

    def wait_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - time.monotonic()))


class LeapingClock:
    """The machine's time without the seconds in which nobody has anything to do: they are leapt over, not waited for.

    For subjects that do nothing while nothing is asked of them, so that low rates take no longer than high ones.
    """

    def __init__(self) -> None:
        self.leapt_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.leapt_s

    def wait_until(self, at_s: float) -> None:
        self.leapt_s += max(0.0, at_s - self())
