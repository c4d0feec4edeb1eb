"""Small shapes and cases that every kind of step has, and measuring on a CPU in place of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moa.eval.gpu import patterns
from moa.eval.gpu.bench import Bench
from moa.eval.gpu.cases import Case
from moa.eval.gpu.heads import HeadShape
from moa.eval.gpu.machine import Rates, describe
from moa.eval.gpu.rows import RowFile

CPU, TINY = torch.device("cpu"), HeadShape("tiny", 6, 2, 16)


class HostClock:
    """Wall time, for devices that work while they are called; nothing to record."""

    def seconds(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no graphs on this device")


@pytest.fixture
def host_clock() -> HostClock:
    return HostClock()


@pytest.fixture
def a_bench(tmp_path: Path) -> Callable[..., Bench]:
    """`a_bench(**changes)`: measures on the CPU into the same rows.csv every time."""

    def make(**changes: object) -> Bench:
        rates, file = Rates(1e10, 1e11, 1e-6), RowFile(tmp_path / "rows.csv")
        return Bench(CPU, HostClock(), describe(CPU), rates, file, dtype=torch.float32, **changes)

    return make


@pytest.fixture(params=["prefill", "chunk", "decode"])
def case(request) -> Case:
    """A step of equal sequences whose windows have moved."""
    pattern = patterns.small(TINY)
    kinds = {
        "prefill": Case("prefill", TINY, pattern, 300, 2),
        "chunk": Case("chunk", TINY, pattern, 401, 2, 130),
        "decode": Case("decode", TINY, pattern, 333, 3),
    }
    return kinds[request.param]
