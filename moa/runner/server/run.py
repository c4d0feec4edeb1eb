"""Run the server until it is told to stop: requests at work finish first, within the grace time."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn

from moa.errors import MoaError, ResourceError
from moa.runner.server.app import new_app
from moa.runner.server.protocol import guarded
from moa.runner.server.service import Service
from moa.runner.server.settings import ServerSettings

# What a second signal leaves the engine: an ordinary step ends within it, and clients are told.
FORCED_S = 1.0


def listen(settings: ServerSettings) -> socket.socket:
    """A socket at the server's address; before the model is loaded, so that a port in use is told at once.

    Raises:
        ResourceError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            stack.pop_all()
    except OSError as error:
        raise ResourceError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; name another with --port"
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which closes in order: no new requests, then those at work, then the door.

    Args:
        service: what is served.
        on_ready: called once clients can connect.
    """

    def __init__(self, service: Service, on_ready: Callable[[], None] | None = None) -> None:
        settings = service.settings
        config = uvicorn.Config(
            new_app(service),
            http=guarded(settings),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self.service, self._on_ready = service, on_ready
        self.stopped_by: int | None = None
        self.has_left_engine = False
        self._deadline_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal begins to close, a second one does not wait; neither ends the process by itself."""
        if self.stopped_by is not None:
            self.should_exit = self.force_exit = True
            return
        self.stopped_by = sig
        self.drain()

    def drain(self) -> None:
        """Take no more requests, and leave when those at work have ended or the grace time is over."""
        self._deadline_s = time.monotonic() + self.service.settings.grace_s
        self.service.is_draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the door."""
        await super().startup(sockets)
        if self._on_ready is not None and self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is left in the engine, so that its clients are told; then close the door.

        A step that hangs cannot be ended: a second signal leaves it behind, on its daemon thread, with its clients.
        """
        closing = asyncio.ensure_future(self.service.served.close())
        while not closing.done() and not self.force_exit:
            await asyncio.wait((closing,), timeout=0.1)
        await asyncio.wait((closing,), timeout=FORCED_S)
        if closing.done():
            closing.result()
        else:
            closing.cancel()
            self.has_left_engine = True
            self.config.timeout_graceful_shutdown = 0
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to leave."""
        if await super().on_tick(counter):
            return True
        if self.service.served.error is not None:
            return True
        over = not self.service.requests or time.monotonic() > self._deadline_s
        return self.service.is_draining and over


def run(service: Service, listener: socket.socket, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until a signal comes.

    Raises:
        MoaError: the engine has failed, or was left behind in a step that did not end.
        SystemExit: interrupted (130); a SIGTERM is the way to stop a server, and ends it without.
    """
    server = Server(service, on_ready)
    server.run(sockets=[listener])
    error = service.served.error
    if error is not None:
        raise MoaError(f"the engine has failed: {type(error).__name__}: {error}") from error
    if server.stopped_by == signal.SIGINT:
        raise SystemExit(130)
    if server.has_left_engine:
        raise MoaError("a second signal came while a step of the engine did not end; its requests were not told")
