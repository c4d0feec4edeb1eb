"""The web application: which path leads where, and what each may answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from moa.runner.server.chat import ChatRequest, chat
from moa.runner.server.completions import CompletionRequest, complete
from moa.runner.server.failures import ApiError, FailureBody, answer_failure
from moa.runner.server.gate import Gate
from moa.runner.server.metrics import CONTENT_TYPE_LATEST
from moa.runner.server.service import Service, service_of
from moa.runner.server.status import status_page

Responses = dict[int | str, dict[str, Any]]
COMPONENTS = "#/components/schemas/"
FAILURES = {
    400: "Something in the request cannot be.",
    401: "No valid API key.",
    403: "A server without keys was not called localhost.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    500: "The model has failed on this request.",
    503: "Too busy, or closing; try again later.",
}


def new_app(service: Service) -> FastAPI:
    """The application over a service, which it starts and closes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.served.start()
        try:
            yield
        finally:
            service.texts.close()
        # not when cancelled, as it is by a second signal: then nobody waits for a step that may hang
        await service.served.close()

    # no pages of documentation: they would load scripts from elsewhere
    app = FastAPI(title="moa", version=version("moa"), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    for kind in (ApiError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer_failure)
    _add_routes(app)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _add_routes(app: FastAPI) -> None:
    work: Responses = {code: {"description": told, "model": FailureBody} for code, told in FAILURES.items()}
    refused: Responses = {code: work[code] for code in (401, 403)}
    missing: Responses = {**refused, 404: work[404]}
    unready: Responses = {403: work[403], 503: {"description": "The engine has failed, or the server is closing."}}
    for path, route, kind in (
        ("/v1/completions", complete, CompletionRequest),
        ("/v1/chat/completions", chat, ChatRequest),
    ):
        app.post(path, responses=work, response_class=JSONResponse, openapi_extra=_takes(kind.__name__))(route)
    app.get("/v1/models", responses=refused, response_class=JSONResponse)(models)
    app.get("/v1/models/{name:path}", responses=missing, response_class=JSONResponse)(model)
    app.get("/health", responses=unready, response_class=JSONResponse)(health)
    app.get("/metrics", responses=refused, response_class=Response)(metrics)
    app.get("/version", responses=refused, response_class=JSONResponse)(version_)
    app.get("/", responses=refused, include_in_schema=False)(status_page)


async def models(request: Request) -> Response:
    """What is served: one model."""
    return JSONResponse({"object": "list", "data": [_model(service_of(request))]})


async def model(request: Request, name: str) -> Response:
    """The model of that name."""
    service = service_of(request)
    service.check_model(name)
    return JSONResponse(_model(service))


async def health(request: Request) -> Response:
    """Whether requests are taken and worked at."""
    service = service_of(request)
    if service.is_ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "closing" if service.is_draining else "failed"}, 503)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(service_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def version_(request: Request) -> Response:
    """Of moa."""
    return JSONResponse({"version": version("moa")})


def _model(service: Service) -> dict[str, Any]:
    plan = None if service.plan is None else service.plan.sha256
    return {
        "id": service.settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "moa",
        "max_model_len": service.longest_tokens,
        "plan_sha256": plan,
    }


def _takes(kind: str) -> dict[str, Any]:
    # by hand, because FastAPI would parse and check the body on the event loop
    content = {"application/json": {"schema": {"$ref": COMPONENTS + kind}}}
    return {"requestBody": {"required": True, "content": content}}


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema, with the bodies that routes read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        kinds = [(kind, "validation") for kind in (CompletionRequest, ChatRequest)]
        _, defined = models_json_schema(kinds, ref_template=COMPONENTS + "{model}")  # type: ignore[arg-type]  # literals
        schema.setdefault("components", {}).setdefault("schemas", {}).update(defined["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
