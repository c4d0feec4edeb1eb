"""The load generator: plays requests out against a subject and notes when each of their tokens came."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

from moa.errors import UsageError
from moa.eval.serving.clock import Clock
from moa.eval.serving.workload import Load


class Event(NamedTuple):
    """What came of a request at a time: so many tokens, and whether that was all; or why there will be no more.

    `total_tokens`, where a server tells it at the end, is believed before the sum of what was counted.
    """

    request: int
    at_s: float
    tokens: int
    is_last: bool = False
    error: str = ""
    total_tokens: int | None = None


class Subject(Protocol):
    """What is measured: an engine, a server, or a plain loop; `about` goes into JSON with every run."""

    name: str
    clock: Clock
    about: Mapping[str, object]

    def submit(self, request: int, load: Load) -> None:
        """Take a request, to be told of by its number."""

    def events(self, until_s: float) -> list[Event]:
        """What has come since the last call; waits for something until then at most."""

    def cancel_all(self) -> None:
        """Drop what was submitted and has not ended; nothing more comes of it."""


@dataclass(slots=True)
class Served:
    """What became of a request, in seconds from the start of the run.

    `sent_s` is when it was due, or in a closed loop when it was let in; `queue_s` is how long it waited at the client
    before that. `chunk_s` is when its tokens came, one time for each piece; `error` says why it failed, "" if it did not.
    """

    input_tokens: int
    wanted_tokens: int
    sent_s: float
    queue_s: float
    chunk_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    is_done: bool = False
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.chunk_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency."""
        return self.chunk_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token but the first; 0 where there is none."""
        more = self.output_tokens - 1
        return (self.e2el_s - self.ttft_s) / more if more > 0 else 0.0

    @property
    def gaps_s(self) -> list[float]:
        """Times between its pieces."""
        return [b - a for a, b in pairwise(self.chunk_s)]

    @property
    def has_succeeded(self) -> bool:
        """Whether it ended without an error, and said something."""
        return self.is_done and not self.error and bool(self.chunk_s)


@dataclass(frozen=True, slots=True)
class Run:
    """Requests in order of arrival, the seconds until the last of them ended, and whether the rest was given up."""

    served: tuple[Served, ...]
    duration_s: float
    is_given_up: bool = False


def drive(
    subject: Subject,
    loads: Sequence[Load],
    *,
    max_concurrency: int | None = None,
    give_up: Callable[[Served], bool] | None = None,
) -> Run:
    """Send every request when it is due, and wait until all have ended.

    Times count from when a request was due and not from when the subject had time to take it, or a subject that
    stalls would be asked less of.

    Args:
        subject: what is measured; it has nothing to do.
        loads: requests in order of arrival.
        max_concurrency: more than so many are never in flight; who is due waits at the client.
        give_up: asked after every piece that came; True ends the run, whose open requests are cancelled.

    Raises:
        UsageError: requests that are not in order of arrival.
    """
    if any(b.due_s < a.due_s for a, b in pairwise(loads)):
        raise UsageError("requests must be in order of arrival")
    return _Player(subject, loads, max_concurrency or len(loads)).play(give_up)


class _Player:
    """A run that goes on."""

    def __init__(self, subject: Subject, loads: Sequence[Load], most: int) -> None:
        self._subject, self._loads, self._most = subject, loads, most
        self._served: list[Served] = []
        self._open: set[int] = set()
        self._begin = subject.clock()
        self._room_s = 0.0  # when there was last room for one more, where there was none before

    def play(self, give_up: Callable[[Served], bool] | None) -> Run:
        clock = self._subject.clock
        while self._has_next or self._open:
            self._send()
            until = self._next_s
            if not self._open and self._has_next:
                clock.wait_until(until)
                continue
            for event in self._subject.events(until) if self._open else ():
                if event.request not in self._open:
                    continue
                self._note(event)
                if give_up is not None and give_up(self._served[event.request]):
                    self._subject.cancel_all()
                    return Run(tuple(self._served), clock() - self._begin, is_given_up=True)
        ends = [one.chunk_s[-1] for one in self._served if one.chunk_s]
        return Run(tuple(self._served), max(ends, default=clock() - self._begin))

    @property
    def _has_next(self) -> bool:
        return len(self._served) < len(self._loads)

    @property
    def _next_s(self) -> float:
        """When the next request is to be sent, as far as is known."""
        if not self._has_next or len(self._open) >= self._most:
            return math.inf
        return self._begin + self._loads[len(self._served)].due_s

    def _send(self) -> None:
        """Submit what is due, as far as concurrency allows."""
        now = self._subject.clock()
        while self._next_s <= now:
            number, load = len(self._served), self._loads[len(self._served)]
            sent = max(load.due_s, self._room_s)
            self._served.append(Served(len(load.prompt), load.output_tokens, sent, sent - load.due_s))
            self._open.add(number)
            try:
                self._subject.submit(number, load)
            except Exception as error:  # noqa: BLE001 - a request that is refused has failed, and the run goes on
                self._note(Event(number, now, 0, is_last=True, error=f"{type(error).__name__}: {error}"))

    def _note(self, event: Event) -> None:
        """Write down what came of a request."""
        one, at = self._served[event.request], event.at_s - self._begin
        if event.tokens:
            one.chunk_s.append(at)
            one.output_tokens += event.tokens
        if event.total_tokens is not None:
            one.output_tokens = event.total_tokens
        one.error, one.is_done = event.error, event.is_last or bool(event.error)
        if one.is_done:
            self._room_s = at if len(self._open) >= self._most else self._room_s
            self._open.discard(event.request)
