"""The engine behind an event loop: requests in from any coroutine, updates out as they come, the model on its own thread.

    engine = Engine(model, plan, settings, tokenizer=tokenizer)
    async with AsyncEngine(engine) as served:                 # starts the thread; drains and closes at the end
        stream = await served.submit(prompt_tokens, SamplingParams(max_tokens=64, n=2), name="req-1")
        async for update in stream:                           # `Update`s: update.index tells the n completions apart
            ...                                               # update.tokens, .text, .logprobs; .finish and .usage at the end
        completions = await (await served.submit(...)).completions()   # or all at once, in order of index

- `submit` raises what `Engine.add` raises, before anything runs: `UsageError` and `ResourceError` for a request that can
  never run (a client's mistake), its subclass `QueueFullError` where it may be tried again (503), and `EngineStoppedError`
  while closing or after a failure (503).
- `stream.cancel()`, or leaving the stream by an exception or by `aclose()`, ends the request at the next step: memory comes
  back, and the last update says `FinishReason.CANCELLED`. `served.cancel(name)` does the same from any thread.
- A reader that stops reading holds up nobody: updates of one completion that it has not taken are joined into one, so what
  waits for it is never more than its own output.
- `served.stats` is `EngineStats` (counts since the start, `stats.last` is the last `StepRecord`), `served.queue()` the
  numbers of running and waiting requests, `served.on_step` a function called on the engine's thread with each StepRecord
  (keep it short). `served.is_healthy` is False when the thread has died or hangs in a step for `hang_s` seconds.
- No method waits for a forward pass but `submit` and `close`, and these without blocking the loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

from moa.errors import ResourceError
from moa.runner.engine import Engine
from moa.runner.request import Completion, FinishReason, SamplingParams, Update, Usage
from moa.runner.stats import EngineStats, StepRecord

HANG_S = 60.0
logger = logging.getLogger(__name__)


class EngineStoppedError(ResourceError):
    """The engine takes no requests: it closes, or has failed."""


class Stream:
    """The updates of one request: `async for update in stream`. Ends when all its completions have."""

    def __init__(self, served: AsyncEngine, name: str, completions: int) -> None:
        self.name = name
        self._served, self._open = served, set(range(completions))
        self._waiting: dict[int, Update] = {}
        self._told = asyncio.Event()

    def cancel(self) -> None:
        """End the request at the next step; updates go on until the last says so."""
        if self._open:
            self._served.cancel(self.name)

    async def completions(self) -> list[Completion]:
        """Wait for the end of all completions; in order of index."""
        told: dict[int, list[Update]] = {}
        async for update in self:
            told.setdefault(update.index, []).append(update)
        return [Completion.of(told[index]) for index in sorted(told)]

    async def __aiter__(self) -> AsyncIterator[Update]:
        try:
            while self._open or self._waiting:
                await self._told.wait()
                self._told.clear()
                while self._waiting:
                    yield self._waiting.pop(next(iter(self._waiting)))
        finally:
            self.cancel()

    def _take(self, update: Update) -> None:
        """On the loop's thread: keep an update for the reader."""
        before = self._waiting.get(update.index)
        self._waiting[update.index] = update if before is None else before.joined(update)
        if update.finish is not None:
            self._open.discard(update.index)
        self._told.set()


class AsyncEngine:
    """Runs an engine on a thread of its own; see the module's docstring.

    Args:
        engine: that nobody else uses from now on; it is closed with this.
        on_step: called on the engine's thread after each step.
        hang_s: a step longer than this is taken for a hang.
    """

    def __init__(
        self, engine: Engine, *, on_step: Callable[[StepRecord], None] | None = None, hang_s: float = HANG_S
    ) -> None:
        self.engine, self.on_step, self.hang_s = engine, on_step, hang_s
        self.error: BaseException | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, Stream] = {}
        self._is_closing = self._is_stopped = self._is_gone = False
        self._beat_s = time.monotonic()
        self._is_stepping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._work, name="moa-engine", daemon=True)

    @property
    def stats(self) -> EngineStats:
        """Counts of the engine; read only."""
        return self.engine.stats

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and its step is not overdue."""
        hangs = self._is_stepping and time.monotonic() - self._beat_s > self.hang_s
        return self._thread.is_alive() and self.error is None and not hangs

    def queue(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return len(self.engine.scheduler.running), len(self.engine.scheduler.waiting)

    async def start(self) -> None:
        """Start the thread; results are delivered to the running loop."""
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        self._thread.start()

    async def submit(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None, name: str | None = None
    ) -> Stream:
        """Queue a request; raises as `Engine.add`.

        Raises:
            EngineStoppedError: it closes, or has failed.
        """
        if self._loop is None or self._is_closing or self._is_stopped:
            why = f" after an error: {self.error}" if self.error else ""
            raise EngineStoppedError(f"the engine takes no requests{why}; start a new one")
        accepted: asyncio.Future[Stream] = self._loop.create_future()
        self._send(lambda: self._add(tuple(prompt), sampling, name, accepted))
        try:
            return await asyncio.shield(accepted)
        except asyncio.CancelledError:
            accepted.add_done_callback(_cancel_stream)
            raise

    def cancel(self, name: str) -> None:
        """End a request, if there is one of that name; from any thread."""
        self._send(lambda: self._cancel(name))

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give those that run so many seconds to end, cancel the rest, and close the engine."""
        if self._done is None:
            self.engine.close()
            return
        self._is_closing = True
        self._send(lambda: None)
        deadline = time.monotonic() + drain_s
        while self._streams and not self._is_stopped and time.monotonic() < deadline:
            await asyncio.sleep(min(0.02, drain_s))
        self._send(self._stop)
        await self._done.wait()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # From here on: the engine's thread, but for `_deliver` and `_accept`.

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._is_gone:
                self._commands.append(command)
                self._wake.notify()
                return
        command()  # with nobody there to run it: requests are refused, and there is nothing to cancel

    def _work(self) -> None:
        try:
            while not self._is_stopped:
                for command in self._taken_commands():
                    command()
                if not self.engine.is_idle:
                    self._step()
        except BaseException as error:  # noqa: BLE001 - nobody may wait for ever for a thread that is gone
            self.error = error
        finally:
            self._is_stopped = True
            self._finish()

    def _taken_commands(self) -> list[Callable[[], None]]:
        """Commands that have come; waits for one if there is nothing else to do."""
        with self._wake:
            while not self._commands and self.engine.is_idle:
                self._wake.wait()
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _step(self) -> None:
        self._beat_s, self._is_stepping = time.monotonic(), True
        try:
            updates = self.engine.step()
        finally:
            self._is_stepping = False
        if updates:
            self._call(self._deliver, updates)
        if self.on_step is not None and self.stats.last is not None:
            try:
                self.on_step(self.stats.last)
            except Exception:
                logger.exception("on_step failed; requests go on")

    def _add(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams | None,
        name: str | None,
        accepted: asyncio.Future[Stream],
    ) -> None:
        try:
            if self._is_stopped:
                raise EngineStoppedError("the engine takes no requests; start a new one")
            name = self.engine.add(prompt, sampling, name)
        except Exception as error:  # noqa: BLE001 - it is the asker's to handle
            self._call(_refuse, accepted, error)
        else:
            self._call(self._accept, accepted, Stream(self, name, 1 if sampling is None else sampling.n))

    def _cancel(self, name: str) -> None:
        self.engine.cancel(name)

    def _stop(self) -> None:
        self._is_stopped = True

    def _finish(self) -> None:
        """End what is left, refuse what still comes, and close the engine."""
        reason = None if self.error is None else f"the engine has failed: {self.error}"
        try:
            updates = self.engine.abandon(reason)
            self.engine.close()
        except Exception as error:  # noqa: BLE001 - the first error is the one to tell
            updates, self.error = [], self.error or error
        with self._wake:
            self._is_gone = True
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:  # requests that came too late are refused
            command()
        self._call(self._end, updates)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Have something done on the loop's thread, unless the loop is gone and with it everybody who waits."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _accept(self, accepted: asyncio.Future[Stream], stream: Stream) -> None:
        self._streams[stream.name] = stream
        accepted.set_result(stream)

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            stream = self._streams.get(update.name)
            if stream is not None:
                stream._take(update)
                if not stream._open:
                    del self._streams[stream.name]

    def _end(self, updates: list[Update]) -> None:
        self._deliver(updates)
        for stream in list(self._streams.values()):
            self._deliver([self._lost(stream.name, index) for index in sorted(stream._open)])
        if self._done is not None:
            self._done.set()

    def _lost(self, name: str, index: int) -> Update:
        """The end of a request of which a broken engine knows no more."""
        now, error = self.engine.clock(), f"the engine has failed: {self.error}"
        usage = Usage(
            prompt_tokens=0,
            output_tokens=0,
            cached_tokens=0,
            preemptions=0,
            arrived_s=now,
            admitted_s=None,
            first_token_s=None,
            finished_s=now,
        )
        return Update(name, index, finish=FinishReason.ERROR, error=error, usage=usage)


def _refuse(accepted: asyncio.Future[Stream], error: Exception) -> None:
    if not accepted.done():
        accepted.set_exception(error)


def _cancel_stream(accepted: asyncio.Future[Stream]) -> None:
    """Nobody waits for this request any more."""
    if not accepted.cancelled() and accepted.exception() is None:
        accepted.result().cancel()
