"""What goes wrong, as OpenAI's API says it: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from moa.errors import ResourceError, UsageError
from moa.runner.async_engine import EngineStoppedError
from moa.runner.request import QueueFullError

RETRY = {"Retry-After": "1"}
GONE = 499  # as nginx logs it; nobody reads the answer
KINDS = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "overloaded_error"}


class Failure(BaseModel):
    """One error."""

    message: str
    type: str
    param: str | None
    code: str | None


class FailureBody(BaseModel):
    """The body of every answer that is an error."""

    error: Failure


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the client: what was wanted, what was got.
        param: the field that is wrong.
        code: a word for programs.
        headers: beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or (RETRY if status == 503 else {}))

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """As an HTTP answer."""
        return JSONResponse(self.body, self.status, self.headers)


def refusal(error: Exception) -> ApiError:
    """What the engine raises for a request, as an answer; anything else is raised again."""
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full")
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), code="not_ready")
    if isinstance(error, ResourceError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    raise error


async def answer_failure(request: Request, error: Exception) -> Response:
    """Exception handler: an `ApiError`, a route's own refusal (404, 405), a client that is gone, or a defect of ours."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=GONE)
    if isinstance(error, ApiError):
        return error.response
    if isinstance(error, HTTPException):
        told = f"{error.detail}: {request.method} {request.url.path}"
        return ApiError(error.status_code, told, headers=error.headers).response
    return ApiError(500, "the server has failed on this request; its log says why", code="internal_error").response
