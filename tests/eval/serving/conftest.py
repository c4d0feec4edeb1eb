"""An engine that computes nothing: the real scheduler and policies on a clock that steps move on by what they would cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest

from moa.eval.serving.drive import Event
from moa.eval.serving.subjects import SARATHI, WHOLE_BUDGET, Contestant
from moa.eval.serving.workload import Load
from moa.runner.account import Footprint, KVAccount
from moa.runner.policies import Job, Limits, get_order, get_policy
from moa.runner.scheduler import Scheduler
from moa.spans import BETA_ONE, SpanRules

# The shipped model on one core of the machine that its figures come from.
STEP_S, DECODE_S, PROMPT_S = 2.5e-3, 0.45e-3, 0.15e-3


class FakeClock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait_until(self, at_s: float) -> None:
        assert at_s < float("inf"), "waits for ever"
        self.now = max(self.now, at_s)


class Nowhere:
    """No memory at all."""

    def admit(self, job: Job) -> None: ...

    def release(self, job: Job) -> None: ...

    def reclaim(self) -> bool:
        return False


class Simulated:
    """Requests under a policy; a step costs so much, a decode and a token of a prompt so much more."""

    def __init__(self, policy: str, token_budget: int, max_running: int = 48) -> None:
        self.name, self.clock, self.about = policy, FakeClock(), {"policy": policy}
        ones = np.ones((1, 1), dtype=np.int64)
        rules = SpanRules(0 * ones, BETA_ONE * ones, 0, 1)
        limits = Limits(token_budget=token_budget, max_running=max_running)
        account = KVAccount(Footprint(rules))
        self.scheduler = Scheduler(get_policy(policy), get_order("fcfs"), account, limits, Nowhere())
        self.requests: dict[Job, tuple[int, int]] = {}
        self.orders = count()

    def submit(self, request: int, load: Load) -> None:
        job = Job(
            order=next(self.orders),
            arrived_s=self.clock(),
            known_tokens=len(load.prompt),
            most_cached_tokens=len(load.prompt) + load.output_tokens - 1,
        )
        self.requests[job] = request, job.known_tokens + load.output_tokens
        self.scheduler.add(job)

    def events(self, until_s: float) -> list[Event]:
        if self.scheduler.is_idle:
            self.clock.wait_until(until_s)
            return []
        turn = self.scheduler.next_turn(self.clock())
        prompt_tokens = turn.tokens - turn.decode_tokens
        self.clock.now += STEP_S + DECODE_S * turn.decode_tokens + PROMPT_S * prompt_tokens
        self.scheduler.settle(turn)
        return [self.said(job) for job, _ in turn.parts if not job.remaining_tokens]

    def said(self, job: Job) -> Event:
        job.known_tokens += 1
        request, most = self.requests[job]
        if job.known_tokens == most:
            self.scheduler.remove(job)
        return Event(request, self.clock(), 1, is_last=job.known_tokens == most)

    def cancel_all(self) -> None:
        for job in [*self.scheduler.waiting, *self.scheduler.running]:
            self.scheduler.remove(job)


@contextmanager
def open_simulated(who: Contestant, token_budget: int) -> Iterator[Simulated]:
    """As `moa.eval.serving.subjects.opener` opens engines."""
    yield Simulated(who.policy, token_budget if who.policy == SARATHI else WHOLE_BUDGET)


@pytest.fixture(scope="session")
def simulated_opener():
    return open_simulated


@pytest.fixture(scope="session")
def step_cost_s():
    return lambda decodes, prompt_tokens=0: STEP_S + DECODE_S * decodes + PROMPT_S * prompt_tokens


@pytest.fixture
def fake_clock():
    return FakeClock()


@pytest.fixture(scope="session")
def fake_clock_type():
    return FakeClock


@pytest.fixture(scope="session")
def simulated_type():
    return Simulated
