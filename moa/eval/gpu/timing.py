"""How long device work takes: whole turns over rotating buffers, by device events, replayed as a graph where it is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

Call = Callable[[], torch.Tensor]
# Below this, launching from Python takes longer than the work: a graph is captured.
GRAPH_BELOW_S = 1e-3
# Turns of one measurement: at least so many, then until the time is used up.
FEWEST_TURNS, MOST_TURNS, TURNS_S = 7, 100, 0.4


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile over turns, each the mean of its calls.

    `launch` says whether calls were replayed from a CUDA graph, and if they should have been and were not, `note` why.
    """

    median_s: float
    low_s: float
    high_s: float
    turns: int
    launch: Literal["graph", "eager"]
    note: str = ""


class Clock(Protocol):
    """Runs device work and says how long the device took."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Run `work` once, wait for it, and return its seconds on the device."""

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` once, to be replayed; raises for work that cannot be recorded."""


class CudaClock:
    """Device events on the current stream, CUDA graphs."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Run `work` once, wait for it, and return its seconds on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` once, to be replayed; raises for work that cannot be recorded."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch asks for: warm up on the stream that records
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def turn_of(calls: Sequence[Call]) -> Callable[[], None]:
    """All calls once, outputs dropped."""

    def turn() -> None:
        for call in calls:
            call()

    return turn


def measure(calls: Sequence[Call], clock: Clock, *, turns_s: float | None = None) -> Timing:
    """Time a call by turns over `calls`, which are equal but for their buffers.

    Buffers of all calls together should be more than three times the L2 cache: then every call finds it cold.

    Args:
        calls: one per set of buffers.
        clock: what measures.
        turns_s: seconds to spend, once the fewest turns are done; TURNS_S if None.
    """
    turns_s = TURNS_S if turns_s is None else turns_s
    turn, launch, note = turn_of(calls), "eager", ""
    clock.seconds(turn)  # compiles and allocates
    once = clock.seconds(turn) / len(calls)
    if once < GRAPH_BELOW_S:
        try:
            turn, launch = clock.graph(turn), "graph"
            clock.seconds(turn)
        except Exception as error:  # noqa: BLE001 - a library refuses to be recorded in its own way
            note = f"no graph: {first_line(error)}"
    seconds: list[float] = []
    while len(seconds) < FEWEST_TURNS or (sum(seconds) < turns_s and len(seconds) < MOST_TURNS):
        seconds.append(clock.seconds(turn) / len(calls))
    low, middle, high = np.quantile(seconds, (0.2, 0.5, 0.8))
    kind: Literal["graph", "eager"] = "graph" if launch == "graph" else "eager"
    return Timing(float(middle), float(low), float(high), len(seconds), kind, note)


def first_line(error: BaseException) -> str:
    """What an error says, in one short line for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
