"""An answer, whole or as a stream: what both kinds of completions have in common."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from moa.runner.request import Update, Usage
from moa.runner.server.deadline import Deadline, deadline_of
from moa.runner.server.events import Events, unless_gone
from moa.runner.server.failures import GONE
from moa.runner.server.fields import SamplingFields, StreamOptions
from moa.runner.server.service import Service
from moa.runner.server.usage import cached, usage_of
from moa.runner.server.work import Choice, Job, Work


class Answer(ABC):
    """Writes the answer to one request.

    `prefix` begins its id, `whole` and `part` are what OpenAI calls an answer and a part of a stream.
    """

    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]

    def __init__(self, service: Service, asked: SamplingFields, jobs: Sequence[Job]) -> None:
        self.service, self.asked, self.jobs = service, asked, jobs
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    @abstractmethod
    def choice(self, number: int, choice: Choice) -> dict[str, Any]:
        """All of a completion."""

    @abstractmethod
    def delta(self, number: int, update: Update, *, is_first: bool) -> dict[str, Any]:
        """What is new of it."""

    def job(self, number: int) -> Job:
        """The job that a choice belongs to."""
        return self.jobs[number // self.jobs[0].sampling.n]

    def head(self, kind: str) -> dict[str, Any]:
        """What all objects begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.settings.name}

    def body(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole answer."""
        told = [self.choice(number, choice) for number, choice in enumerate(choices)]
        outputs = sum(len(choice.tokens) for choice in choices)
        kept = cached(choice.usage for choice in choices[:: self.jobs[0].sampling.n])
        return {**self.head(self.whole), "choices": told, "usage": usage_of(self.prompt_tokens, outputs, kept)}

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(job.prompt) for job in self.jobs)

    async def parts(self, work: Work) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream."""
        options = self.asked.stream_options or StreamOptions()
        outputs, seen, ended = 0, set[int](), list[Usage | None]()
        async with aclosing(work.updates()) as updates:
            async for number, update in updates:
                delta = await self._delta(number, update, is_first=number not in seen)
                seen.add(number)
                outputs += len(update.tokens)
                if not number % self.jobs[0].sampling.n:
                    ended.append(update.usage)
                part = {**self.head(self.part), "choices": [delta]}
                if options.include_usage:
                    running = usage_of(self.prompt_tokens, outputs) if options.continuous_usage_stats else None
                    part["usage"] = running
                yield part
        if options.include_usage:
            usage = usage_of(self.prompt_tokens, outputs, cached(ended))
            yield {**self.head(self.part), "choices": [], "usage": usage}

    async def _delta(self, number: int, update: Update, *, is_first: bool) -> dict[str, Any]:
        if not update.prompt_logprobs:
            return self.delta(number, update, is_first=is_first)
        # a whole prompt's take long to write
        return await self.service.texts.aside(self.delta, number, update, is_first=is_first)


async def answer(
    request: Request,
    service: Service,
    asked: SamplingFields,
    make_jobs: Callable[[], Awaitable[list[Job]]],
    kind: Callable[[Service, SamplingFields, Sequence[Job]], Answer],
) -> Response:
    """Queue a request's jobs, and answer whole or as a stream; a client that goes takes its work along.

    Raises:
        ApiError: it is refused, or fails before the first byte.
    """
    deadline = deadline_of(request)
    made = await unless_gone(request.receive, _begun(service, asked, make_jobs, kind, deadline))
    if made is None:
        return Response(status_code=GONE)
    writer, work = made
    if asked.stream:
        return Events(writer.parts(work), work.end)
    try:
        choices = await unless_gone(request.receive, work.choices())
        if choices is None:
            return Response(status_code=GONE)
        body = await service.texts.aside(lambda: _encoded(writer.body(choices)))
        return Response(body, media_type="application/json")
    finally:
        work.end()


async def _begun(
    service: Service,
    asked: SamplingFields,
    make_jobs: Callable[[], Awaitable[list[Job]]],
    kind: Callable[[Service, SamplingFields, Sequence[Job]], Answer],
    deadline: Deadline,
) -> tuple[Answer, Work]:
    writer = kind(service, asked, await deadline.keep(make_jobs()))
    work = Work(service, writer.jobs, writer.id, deadline)
    await work.start()
    return writer, work


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
