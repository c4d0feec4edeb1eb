"""What one HTTP request has the engine do: several prompts, several completions of each, all ended when it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from moa.errors import MoaError
from moa.runner.async_engine import Stream
from moa.runner.request import FinishReason, SamplingParams, TokenLogprobs, Update, Usage
from moa.runner.server.deadline import Deadline
from moa.runner.server.failures import ApiError, refusal
from moa.runner.server.service import Service


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, and how to go on. `text` is the prompt as it was given or reads, where it is wanted back."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    text: str = ""


@dataclass(slots=True)
class Choice:
    """One completion, put together from its updates."""

    tokens: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)

    def add(self, update: Update) -> None:
        """Go on."""
        self.tokens += update.tokens
        self.parts.append(update.text)
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.finish, self.usage = update.finish, update.usage


class Work:
    """Jobs at work, from `start()` to `end()`.

    Choices are numbered as OpenAI does: those of the first prompt, then those of the second.
    """

    def __init__(self, service: Service, jobs: Sequence[Job], name: str, deadline: Deadline | None = None) -> None:
        self.service, self.jobs, self.name = service, jobs, name
        self._streams: list[Stream] = []
        self._deadline = deadline or Deadline(service.settings.request_s)

    async def start(self) -> None:
        """Queue all jobs, or none.

        Raises:
            ApiError: the engine refuses one, or time is up.
        """
        try:
            await self._deadline.keep(self._submit())
            for job in self.jobs:
                self.service.metrics.count_prompt(len(job.prompt))
        except BaseException as error:
            self.end()
            if isinstance(error, MoaError):
                raise refusal(error) from None
            raise

    async def _submit(self) -> None:
        """All at once: the engine takes requests between steps, and one that waited for the other would cost a step each."""
        submit = self.service.served.submit
        tasks = [
            asyncio.create_task(submit(job.prompt, job.sampling, f"{self.name}-{i}")) for i, job in enumerate(self.jobs)
        ]
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:  # all have ended, also where this was cancelled
            self._streams = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
        for task in tasks:
            task.result()

    def end(self) -> None:
        """Cancel what still goes on."""
        for stream in self._streams:
            stream.cancel()

    async def updates(self) -> AsyncGenerator[tuple[int, Update], None]:
        """Numbers of choices and what is new about them.

        Raises:
            ApiError: the engine has failed on one of them, or time is up.
        """
        over = asyncio.get_running_loop().call_later(self._deadline.left_s, self.end)  # also while a client dawdles
        try:
            async with aclosing(self._merged()) as merged:
                while (item := await self._deadline.keep(anext(merged, None))) is not None:
                    choice, update = item
                    if update.error is not None and update.tokens:  # said before it failed: the reader came late
                        yield choice, replace(update, finish=None, error=None, usage=None)
                    _check(update)
                    yield choice, update
        finally:
            over.cancel()
            self.end()

    async def choices(self) -> list[Choice]:
        """Wait for the ends of all; raises as `updates`."""
        told = [Choice() for job in self.jobs for _ in range(job.sampling.n)]
        async with aclosing(self.updates()) as updates:
            async for choice, update in updates:
                told[choice].add(update)
        return told

    async def _merged(self) -> AsyncGenerator[tuple[int, Update], None]:
        """Updates of all streams as they come; a reader that waits makes them wait in their streams."""
        queue: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue(maxsize=1)
        pumps = [asyncio.create_task(self._pump(i, queue)) for i in range(len(self._streams))]
        try:
            for _ in pumps:
                while (item := await queue.get()) is not None:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, number: int, queue: asyncio.Queue[tuple[int, Update] | None]) -> None:
        first = sum(job.sampling.n for job in self.jobs[:number])
        watched = self.service.metrics.watch(aiter(self._streams[number]), self._deadline.started_s)
        async with aclosing(watched) as updates:
            async for update in updates:
                await queue.put((first + update.index, update))
        await queue.put(None)


def _check(update: Update) -> None:
    if update.finish is FinishReason.ERROR:
        raise ApiError(500, f"the model failed on this request: {update.error}", code="model_error")
    if update.finish is FinishReason.CANCELLED:
        raise ApiError(503, "the request was ended by the server", code="cancelled")
