"""What all routes share: the engine, the tokenizer, metrics, and whether the server is closing."""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass, field

from starlette.requests import Request

from moa.plan import Plan
from moa.runner.async_engine import AsyncEngine
from moa.runner.engine import Engine
from moa.runner.server.failures import ApiError
from moa.runner.server.metrics import Metrics
from moa.runner.server.settings import ServerSettings
from moa.runner.server.texts import Texts

# A model that says nothing about its context, with memory without end, still gets a limit that clients can be told.
MOST_TOKENS = 1 << 24


@dataclass(slots=True, kw_only=True)
class Service:
    """The state of a server.

    Args:
        served: the engine on its thread.
        texts: its tokenizer.
        settings: of the server.
        plan: that the model runs under, if any.
        longest_tokens: prompt and output together that a request can ever have.
        requests: HTTP requests for completions at work.
        is_draining: whether no more are taken.
    """

    served: AsyncEngine
    texts: Texts
    settings: ServerSettings
    metrics: Metrics
    plan: Plan | None = None
    longest_tokens: int = MOST_TOKENS
    created: int = field(default_factory=lambda: int(time.time()))
    requests: int = 0
    is_draining: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken and worked at."""
        return self.served.is_healthy and not self.is_draining

    def check_model(self, name: str | None) -> None:
        """Refuse requests for another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.settings.name:
            told = f"the model {name!r} is not served here; this is {self.settings.name!r}"
            raise ApiError(404, told, param="model", code="model_not_found")

    def check_length(self, prompt_tokens: int) -> None:
        """Refuse a prompt that leaves no room; the engine has the last word on what fits.

        Raises:
            ApiError: 400.
        """
        if not prompt_tokens:
            raise ApiError(400, "a prompt must have at least 1 token", param="prompt", code="invalid_value")
        if prompt_tokens > self.longest_tokens:
            told = f"a prompt of {prompt_tokens} tokens; prompt and output together can have {self.longest_tokens}"
            raise ApiError(400, told, param="prompt", code="context_length_exceeded")


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service


def new_service(
    engine: Engine, tokenizer: object, settings: ServerSettings, served: AsyncEngine | None = None
) -> Service:
    """A service over an engine that nobody else uses.

    Raises:
        ModelError: the tokenizer's chat template does not end.
    """
    texts = Texts(tokenizer)  # type: ignore[arg-type]  # transformers' tokenizers have no common type that says enough
    texts.check_chat_template()
    served = served or AsyncEngine(engine, hang_s=settings.hang_s)
    metrics = Metrics(served)
    longest = texts.longest_tokens = longest_tokens(engine)
    return Service(
        served=served,
        texts=texts,
        settings=settings,
        metrics=metrics,
        plan=engine.plan,
        longest_tokens=longest,
    )


def longest_tokens(engine: Engine) -> int:
    """Tokens that a request alone can have, by the model's context and by KV memory."""
    most = engine.context_tokens or MOST_TOKENS
    account = engine.host.account
    total = account.total_slots
    if total is None:
        return most
    footprint = account.footprint

    def slots(length: int) -> int:
        return footprint.most(length, length if footprint.is_pinned else None)

    return most if slots(most) <= total else bisect.bisect_right(range(1, most), total, key=slots)
