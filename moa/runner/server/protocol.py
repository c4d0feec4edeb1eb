"""HTTP connections that cannot be held open for nothing: uvicorn's, with clocks and a limit on their number.

uvicorn waits for ever for the rest of a request that comes byte by byte, and for a client that has stopped reading.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moa.runner.server.settings import ServerSettings


def guarded(settings: ServerSettings) -> type[H11Protocol]:
    """The class of connections that keep a server's limits; uvicorn makes one of each connection."""
    return type("Guarded", (GuardedProtocol,), {"limits": settings})


class GuardedProtocol(H11Protocol):
    """A connection that is cut off when its client is too slow."""

    limits = ServerSettings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaited: object = None
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._watch_reading(has_begun=True)
        self._watch_writing()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request, and see that the rest comes in time."""
        super().data_received(data)
        self._watch_reading(has_begun=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the clocks go."""
        super().connection_lost(exc)
        for clock in (self._reading, self._writing):
            if clock is not None:
                clock.cancel()

    def _watch_reading(self, *, has_begun: bool) -> None:
        """One clock for a request's header and one for its body: bytes that trickle in do not set them back."""
        state = self.conn.their_state
        awaited = state if state in (h11.IDLE, h11.SEND_BODY) else None
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if awaited is not None:
            # the body's own limit answers with 408; this one is for what nobody reads
            seconds = self.limits.header_s if awaited is h11.IDLE else self.limits.body_s + 1
            self._reading = self.loop.call_later(seconds, self.transport.abort)

    def _watch_writing(self) -> None:
        """Cut off a client that has taken nothing of what waits for it since the last look."""
        unsent = self.transport.get_write_buffer_size()
        stands = self.flow.write_paused or self.transport.is_closing()
        if stands and unsent and unsent >= self._unsent_bytes > 0:
            self.transport.abort()
            return
        self._unsent_bytes = unsent if stands else 0
        self._writing = self.loop.call_later(self.limits.stall_s / 2, self._watch_writing)
