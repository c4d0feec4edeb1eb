"""A request's body: read within its limits, then parsed and checked off the event loop."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from moa.runner.server.deadline import deadline_of
from moa.runner.server.failures import ApiError
from moa.runner.server.fields import Strict

if TYPE_CHECKING:
    from moa.runner.server.service import Service

Kind = TypeVar("Kind", bound=Strict)
# The client is not to send the rest of what was refused.
CLOSE = {"Connection": "close"}


async def read_body(request: Request, service: Service, kind: type[Kind]) -> Kind:
    """The body as what it should be.

    Raises:
        ApiError: it is too long (413), too slow (408), not JSON by its header (415) or by itself (400), or says what
            cannot be (400); or the request's time is up (503).
        ClientDisconnect: the client is gone.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a form of another web page could be sent here without asking, JSON could not
        raise ApiError(415, "the body must be JSON: Content-Type: application/json", headers=CLOSE)
    deadline = deadline_of(request)
    body = await deadline.keep(_read_in_time(request, service))
    return await deadline.keep(service.texts.aside(_parsed, body, kind))


async def _read_in_time(request: Request, service: Service) -> bytes:
    try:
        async with asyncio.timeout(service.settings.body_s):
            return await _read(request, service.settings.body_bytes)
    except TimeoutError:
        raise ApiError(408, "the body took too long", code="body_timeout", headers=CLOSE) from None


async def _read(request: Request, most_bytes: int) -> bytes:
    told = request.headers.get("content-length", "0")
    too_long = ApiError(413, f"the body is longer than {most_bytes} bytes", code="request_too_large", headers=CLOSE)
    if not told.isdigit() or len(told) > 15 or int(told) > most_bytes:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most_bytes:
            raise too_long
    return bytes(body)


def _parsed(body: bytes, kind: type[Kind]) -> Kind:
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in body:
            json.dumps(content, ensure_ascii=False).encode("utf-8")  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refused(first["loc"], first["msg"]) from None


def _refused(place: tuple[int | str, ...], message: str) -> ApiError:
    # behind a union's name comes the one of its types that pydantic speaks of
    name = ".".join(str(part) for part in place if not str(part).startswith(("function-", "list[", "constrained-")))
    return ApiError(400, f"{name}: {message}" if name else message, param=name or None, code="invalid_value")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
