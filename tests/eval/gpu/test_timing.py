"""Turns over buffers, graphs for short work, quantiles; with clocks that stand in for a device's."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from moa.eval.gpu import machine, timing
from moa.eval.gpu.timing import measure


class Scripted:
    """A clock that reads its seconds from a list (the last for ever) and counts what ran."""

    def __init__(self, seconds: list[float], graph_error: str = "") -> None:
        self.times, self.graph_error, self.graphs = list(seconds), graph_error, 0

    def seconds(self, work) -> float:
        work()
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]

    def graph(self, work):
        if self.graph_error:
            raise RuntimeError(self.graph_error)
        self.graphs += 1
        return work


def counted(n: int) -> tuple[list[int], list]:
    counts = [0] * n

    def call(i: int) -> torch.Tensor:
        counts[i] += 1
        return torch.zeros(1)

    return counts, [lambda i=i: call(i) for i in range(n)]


def test_every_buffer_takes_its_turn_and_the_time_is_of_one_call() -> None:
    counts, calls = counted(3)
    found = measure(calls, Scripted([9.0, 0.3, 0.3]))
    assert (found.median_s, found.launch) == (pytest.approx(0.1), "eager")
    assert counts == [counts[0]] * 3
    assert counts[0] == found.turns + 2, "one turn to warm up, one to choose"


def test_quantiles_are_over_turns() -> None:
    _, calls = counted(1)
    found = measure(calls, Scripted([9.0, 1.0, *[5.0, 1.0, 2.0, 3.0, 4.0, 9.0, 7.0]]))
    assert (found.low_s, found.median_s, found.high_s) == (pytest.approx(2.2), 4.0, pytest.approx(6.6))


def test_short_work_is_replayed_from_a_graph_and_long_work_is_not() -> None:
    _, calls = counted(2)
    short, long = Scripted([1.0, timing.GRAPH_BELOW_S]), Scripted([1.0, 3 * timing.GRAPH_BELOW_S])
    assert measure(calls, short).launch == "graph"
    assert measure(calls, long).launch == "eager"
    assert (short.graphs, long.graphs) == (1, 0)


def test_work_that_cannot_be_recorded_says_so() -> None:
    found = measure(counted(1)[1], Scripted([1e-5], "it syncs\nmore"))
    assert (found.launch, found.note) == ("eager", "no graph: RuntimeError: it syncs")


def test_short_work_is_repeated_until_the_time_is_used_up() -> None:
    assert measure(counted(1)[1], Scripted([1e-5])).turns == timing.MOST_TURNS
    assert measure(counted(1)[1], Scripted([0.1])).turns == timing.FEWEST_TURNS
    assert measure(counted(1)[1], Scripted([0.02])).turns == pytest.approx(timing.TURNS_S / 0.02, abs=1)


def test_rates_count_bytes_both_ways_and_two_operations_per_multiply_add() -> None:
    rates = machine.measure_rates(torch.device("cpu"), Scripted([0.5]), copy_bytes=4096, matmul_size=8)
    assert rates.copy_bytes_per_s == 2 * 4096 / 0.5
    assert rates.matmul_flops_per_s == 2 * 8**3 / 0.5
    assert rates.launch_s == 0.5 / machine.LAUNCHES


def test_a_cpu_has_no_clocks_and_no_multiprocessors() -> None:
    device = torch.device("cpu")
    assert machine.clocks(device) == machine.Clocks()
    found = machine.describe(device)
    assert (found.multiprocessors, found.l2_bytes) == (0, 0)
    assert dict(found.versions)["torch"] == version("torch")


def test_what_the_driver_says_is_read() -> None:
    assert machine.parse_query("1980, 3201, 412.33, [N/A]\n") == ("1980", "3201", "412.33", "[N/A]")
    assert machine._number("[N/A]") is None
