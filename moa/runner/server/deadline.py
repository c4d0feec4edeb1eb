"""How long a request may take in all, from the moment it came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from moa.runner.server.failures import ApiError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deadline:
    """The end of a request's time.

    Args:
        limit_s: seconds that it may take.
        started_s: when it came, by the monotonic clock.
    """

    limit_s: float
    started_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds until time is up; 0 when it is."""
        return max(0.0, self.started_s + self.limit_s - time.monotonic())

    async def keep(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when time is up.

        Around each wait, never around a `yield`: a generator's reader would be cancelled in its place.

        Raises:
            ApiError: 503, time is up, even where `work` would be done at once.
        """
        clock = asyncio.timeout(self.left_s)
        try:
            async with clock:
                done = await work
        except TimeoutError:
            if not clock.expired():
                raise
            raise self._error from None
        if not self.left_s:
            raise self._error
        return done

    @property
    def _error(self) -> ApiError:
        return ApiError(503, f"the request took longer than {self.limit_s:g} s", code="timeout")


def deadline_of(request: Request) -> Deadline:
    """That of a request, which has come through the gate."""
    deadline: Deadline = request.state.deadline
    return deadline
