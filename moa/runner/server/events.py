"""Answers that come as server-sent events, and work that ends when its client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from moa.runner.server.failures import ApiError

T = TypeVar("T")
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies are to pass events on as they come
]
DONE = b"data: [DONE]\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and the work cancelled, when the client is gone before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class Events(Response):
    """A stream of JSON objects that ends with "[DONE]", or with an error and then "[DONE]".

    Args:
        objects: what is sent, one event each.
        end: called when nothing more is sent, whatever the reason.
    """

    media_type = "text/event-stream"

    def __init__(self, objects: AsyncGenerator[Mapping[str, Any], None], end: Callable[[], None]) -> None:
        super().__init__()
        self._objects, self._end = objects, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, while there is somebody to read."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            async with aclosing(self._objects) as objects:
                async for content in objects:
                    await send(_part(_event(content)))
        except ApiError as error:
            await send(_part(_event(error.body)))
        await send(_part(DONE))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
