"""Faults of all kinds at any time: every request ends exactly once, for the right reason, and all memory comes back.

A state machine runs an engine and, beside it, a model that knows of each request only what it may end as.
"""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moa.errors import ResourceError
from moa.runner import engine as engine_module
from moa.runner import packed
from moa.runner.engine import MOST_SHORTAGES, Engine
from moa.runner.policies import ORDERS, POLICIES
from moa.runner.request import FinishReason, QueueFullError, Update
from moa.runner.settings import EngineSettings

MOST_WAITING = 5
FAULTS = ("forward", "allocation", "out of memory", "sampler", "NaN", "copy")


class Injector:
    """Makes the next step fail in the way that is set, and says whether it did."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.fault, self.struck = engine, "", ""
        self._attend, self._sample, self._copy = packed.attend, engine_module.sample, engine.host.memory.copy
        packed.attend, engine_module.sample = self.attend, self.sample
        engine.host.memory.copy = self.copy

    def undo(self) -> None:
        packed.attend, engine_module.sample = self._attend, self._sample

    def _strikes(self, *faults: str) -> bool:
        if self.fault in faults:
            self.struck, self.fault = self.fault, ""
            return True
        return False

    def attend(self, q, k, v, kv, layer, *args, **options) -> torch.Tensor:
        """The first layer has stored its keys when the second fails."""
        if layer == 1 and self._strikes("forward", "allocation", "out of memory"):
            raise {
                "forward": RuntimeError("a kernel failed"),
                "allocation": ResourceError("the KV pool is full"),
                "out of memory": torch.OutOfMemoryError("no more"),
            }[self.struck]
        return self._attend(q, k, v, kv, layer, *args, **options)

    def sample(self, logits: torch.Tensor, draws: list[object]) -> object:
        if self._strikes("sampler"):
            raise ValueError("sampling failed")
        if draws and self._strikes("NaN"):
            logits = logits.clone()
            logits[0, 5] = torch.nan
        return self._sample(logits, draws)

    def copy(self, source: int, sequence: int) -> None:
        if self._strikes("copy"):
            raise MemoryError
        self._copy(source, sequence)


class Faults(RuleBasedStateMachine):
    """The engine beside what each request may end as."""

    world: SimpleNamespace  # set by the test

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        order=st.sampled_from(sorted(ORDERS)),
        memory=st.sampled_from([240, 300, 2000]),
        budget=st.sampled_from([1, 30, 200, None]),
        ratio=st.sampled_from([0.0, 0.4]),
        planned=st.booleans(),
    )
    def start(self, policy, order, memory, budget, ratio, planned) -> None:
        world = self.world
        chosen = EngineSettings(
            policy=policy,
            order=order,
            token_budget=budget,
            kv_bytes=memory * world.token_bytes,
            prefix_cache_ratio=ratio,
            prefix_block_tokens=16,
            max_waiting=MOST_WAITING,
            max_running=4,
        )
        clock = count(0.0, 0.01).__next__  # orders look at it, and failures must come again
        self.engine = Engine(world.model, world.plan if planned else None, chosen, clock=clock)
        self.alone = world.alone[planned]
        self.injector = Injector(self.engine)
        self.asked: dict[str, tuple[int, ...]] = {}
        self.told: dict[str, list[Update]] = {}
        self.may_end: dict[str, set[FinishReason]] = {}

    @rule(text=st.integers(0, 21))
    def add(self, text: int) -> None:
        name, prompt = str(len(self.asked)), self.world.texts[text]
        waiting = len(self.engine.scheduler.waiting)
        try:
            self.engine.add(prompt, self.world.greedy, name)
        except QueueFullError:
            assert waiting >= MOST_WAITING  # whoever had to go waits again
            return
        assert waiting < MOST_WAITING
        self.asked[name], self.told[name], self.may_end[name] = prompt, [], {FinishReason.LENGTH}

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which: int) -> None:
        name = str(which % len(self.asked))
        is_live = (
            not any(update.finish for update in self.told[name]) and FinishReason.CANCELLED not in self.may_end[name]
        )
        assert self.engine.cancel(name) is is_live
        if is_live:
            self.may_end[name] = {FinishReason.CANCELLED}

    @rule(fault=st.sampled_from(FAULTS))
    def set_fault(self, fault: str) -> None:
        self.injector.fault = fault

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            scheduler = self.engine.scheduler
            # who was computed anew before waits for the step that may end it
            shortages = {job.request.name: job.shortages for job in (*scheduler.running, *scheduler.waiting)}
            self.injector.struck = ""
            updates = self.engine.step()
            self._take(updates, shortages)

    def _take(self, updates: list[Update], shortages: dict[str, int]) -> None:
        struck = self.injector.struck
        for update in updates:
            if update.finish is FinishReason.ERROR:
                assert struck in ("forward", "sampler", "NaN", "allocation", "out of memory"), struck
                if struck in ("allocation", "out of memory"):
                    assert shortages[update.name] == MOST_SHORTAGES
                assert update.error
                self.may_end[update.name] = {FinishReason.ERROR}
            self.told[update.name].append(update)
        if struck in ("forward", "sampler"):
            assert any(update.finish is FinishReason.ERROR for update in updates)
        if struck == "NaN":
            assert [update.finish for update in updates].count(FinishReason.ERROR) == 1

    @invariant()
    def nobody_ends_twice_or_says_anything_wrong(self) -> None:
        for name, updates in getattr(self, "told", {}).items():
            ends = [update.finish for update in updates if update.finish]
            assert len(ends) <= 1
            assert not ends or (updates[-1].finish is ends[0] and ends[0] in self.may_end[name])
            said = [token for update in updates for token in update.tokens]
            assert said == self.alone.say(self.asked[name])[0][: len(said)]

    @invariant()
    def the_account_adds_up(self) -> None:
        if hasattr(self, "engine"):
            host, scheduler = self.engine.host, self.engine.scheduler
            held = {job.order for job in scheduler.running}
            assert sum(host.account.held(holder) for holder in host.memory.sequences) == host.account.used_slots
            assert held <= set(host.memory.sequences)
            assert len(host.memory.sequences) == len(held) + (len(host.cache) if host.cache else 0)
            assert 0 <= host.account.used_slots <= host.account.total_slots

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.injector.fault = ""
            steps = 0
            while not self.engine.is_idle:
                self.step(1)
                steps += 1
                assert steps < 10_000, "the engine makes no progress"
            self.nobody_ends_twice_or_says_anything_wrong()
            assert all(updates and updates[-1].finish for updates in self.told.values())
            self.world.memory_is_back(self.engine)
        finally:
            self.injector.undo()
            self.engine.close()


@pytest.fixture
def world(model, plan, texts, alone, greedy, token_bytes, memory_is_back) -> SimpleNamespace:
    names = {"model": model, "plan": plan, "texts": texts, "alone": alone, "greedy": greedy}
    return SimpleNamespace(**names, token_bytes=token_bytes, memory_is_back=memory_is_back)


def run_machine(world: SimpleNamespace, examples: int, steps: int) -> None:
    machine = type("FaultsHere", (Faults,), {"world": world})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


def test_every_request_ends_once_whatever_fails(world) -> None:
    run_machine(world, 12, 30)


@pytest.mark.nightly
def test_every_request_ends_once_whatever_fails_for_long(world) -> None:
    run_machine(world, 400, 250)
