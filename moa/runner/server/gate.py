"""What every request passes: the key, or the name it was sent to; then, if it is for work, whether there is room for it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from moa.runner.server.deadline import Deadline
from moa.runner.server.failures import ApiError
from moa.runner.server.service import Service
from moa.runner.server.settings import is_local

OPEN_PATHS = ("/health",)


class Gate:
    """ASGI middleware: nobody without a key gets further than /health, and work is limited in number.

    A key comes as `Authorization: Bearer KEY`, or as the password of `Basic`, which browsers ask for. Where none is needed
    because only this machine can connect, requests must name this machine: a web page whose name was made to lead here
    (DNS rebinding) sends its own, and cannot be told apart otherwise.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._digests = [_digest(key.encode()) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            self._check_key(scope)
            self._check_room(scope)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        is_work = scope["method"] == "POST"
        scope.setdefault("state", {})["deadline"] = Deadline(self._service.settings.request_s)
        self._service.requests += is_work
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.requests -= is_work

    def _check_host(self, scope: Scope) -> None:
        settings = self._service.settings
        if self._digests or settings.insecure or not settings.is_local:
            return
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1 or not is_local(_host_name(given[0])):
            told = "without an API key, requests must be sent to localhost, 127.0.0.1 or [::1] by that name"
            raise ApiError(403, told, code="host_not_allowed", headers={"Connection": "close"})

    def _check_key(self, scope: Scope) -> None:
        if not self._digests or scope["path"] in OPEN_PATHS:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not _is_known(_key(given[0]), self._digests):
            # a browser asks its user for a key only where it is told to
            scheme = "Basic" if scope["path"] == "/" else "Bearer"
            headers = {"WWW-Authenticate": f'{scheme} realm="moa"', "Connection": "close"}
            raise ApiError(401, "a valid API key is needed", code="invalid_api_key", headers=headers)

    def _check_room(self, scope: Scope) -> None:
        service = self._service
        if scope["method"] != "POST":
            return
        if service.is_draining:
            raise ApiError(503, "the server is closing", code="closing", headers={"Retry-After": "5"})
        if service.requests >= service.settings.requests:
            raise ApiError(503, f"{service.requests} requests are at work, no more are taken", code="overloaded")


def _host_name(header: bytes) -> str:
    """Of a Host header, without the port and without the brackets of an IPv6 address."""
    host = header.decode("latin-1").strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _key(authorization: bytes) -> bytes:
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _is_known(key: bytes, digests: Sequence[bytes]) -> bool:
    """Takes the same time whichever key it is, and however much of one was guessed."""
    digest, known = _digest(key), False
    for each in digests:
        known |= hmac.compare_digest(digest, each)
    return known


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
