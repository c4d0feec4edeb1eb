"""What Sarathi-Serve promises of its schedule, and what every policy owes: held for random loads without any model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import UsageError
from moa.runner.account import Footprint, KVAccount
from moa.runner.policies import ORDERS, POLICIES, Job, Limits, Turn, get_order, get_policy
from moa.runner.scheduler import Scheduler
from moa.spans import BETA_ONE, SpanRules

QUARTER = SpanRules(np.zeros((1, 2), np.int64), np.array([[BETA_ONE, BETA_ONE // 4]]), sink_tokens=2, min_span_tokens=8)


class NoMemory:
    """A host without memory: counts who is in."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def admit(self, job: Job) -> None:
        assert job.order not in self.held
        self.held.add(job.order)

    def release(self, job: Job) -> None:
        self.held.remove(job.order)

    def reclaim(self) -> bool:
        return False


class Load:
    """Runs a scheduler over requests (prompt, output, step of arrival); a step takes a second.

    A request's token is there once its prompt is computed; `watch` sees every turn, before it runs.
    """

    def __init__(self, requests, watch: Callable[[Scheduler, Turn], None] | None = None, **options) -> None:
        self.host = NoMemory()
        account = KVAccount(Footprint(QUARTER), options.pop("slots", None))
        policy, order = get_policy(options.pop("policy", "sarathi")), get_order(options.pop("order", "fcfs"))
        self.scheduler = Scheduler(policy, order, account, Limits(**options), self.host)
        self.requests, self.watch = requests, watch
        self.ended: dict[int, int] = {}
        self.first_token: dict[int, int] = {}
        self.said = dict.fromkeys(range(len(requests)), 0)

    def run(self, most_steps: int = 5000) -> Load:
        jobs: dict[int, Job] = {}
        for step in range(most_steps):
            for i, (prompt, output, arrival) in enumerate(self.requests):
                if arrival == step:
                    jobs[i] = Job(order=i, arrived_s=step, known_tokens=prompt, most_cached_tokens=prompt + output - 1)
                    self.scheduler.add(jobs[i])
            if self.scheduler.is_idle and len(jobs) == len(self.requests):
                break
            turn = self.scheduler.next_turn(float(step))
            if self.watch:
                self.watch(self.scheduler, turn)
            assert turn.chosen or self.scheduler.is_idle or turn.preempted, "nothing runs"
            assert all(1 <= tokens <= job.remaining_tokens for job, tokens in turn.parts)
            self.scheduler.settle(turn)
            for job in list(turn.chosen):
                if not job.remaining_tokens:
                    self._say(job, step)
        assert len(self.ended) == len(self.requests), "a request starves"
        assert not self.host.held
        assert not self.scheduler.account.used_slots
        return self

    def _say(self, job: Job, step: int) -> None:
        self.first_token.setdefault(job.order, step)
        self.said[job.order] += 1
        job.known_tokens += 1
        if self.said[job.order] == self.requests[job.order][1]:
            self.ended[job.order] = step
            self.scheduler.remove(job)


LOADS = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=14)


@given(LOADS, st.integers(1, 150), st.integers(1, 12), st.sampled_from([1, 16]), st.sampled_from(sorted(ORDERS)))
def test_sarathi_keeps_the_budget_and_stalls_no_decode(requests, budget, most, tile, order) -> None:
    def watch(scheduler: Scheduler, turn: Turn) -> None:
        assert turn.tokens == sum(turn.chosen.values()) <= budget
        decodes = [job for job in scheduler.running if job.is_decoding]
        skipped = [job for job in decodes if job not in turn.chosen]
        if skipped:  # only if the budget is full of decodes, who were not served for longer
            assert turn.tokens == budget
            assert all(job.is_decoding for job in turn.chosen)
            assert max(job.served for job in turn.chosen) <= min(job.served for job in skipped)
        assert len(scheduler.running) <= most

    Load(requests, watch, token_budget=budget, max_running=most, tile_tokens=tile, order=order).run()


@given(LOADS, st.sampled_from(sorted(POLICIES)), st.sampled_from(sorted(ORDERS)), st.integers(200, 500))
def test_nobody_starves_in_little_memory(requests, policy, order, slots) -> None:
    load = Load(requests, policy=policy, order=order, slots=slots, token_budget=64, max_running=8).run()
    assert all(load.said[i] == output for i, (_, output, _) in enumerate(requests))


@given(LOADS)
def test_who_came_first_is_first_answered_where_prompts_run_whole(requests) -> None:
    load = Load(requests, policy="orca").run()
    order = sorted(range(len(requests)), key=lambda i: (requests[i][2], i))
    first = [load.first_token[i] for i in order]
    assert first == sorted(first)


def test_memory_makes_the_youngest_go_and_lets_the_oldest_run() -> None:
    gone: list[list[int]] = []

    def watch(scheduler: Scheduler, turn: Turn) -> None:
        gone.append([job.order for job in turn.preempted])
        if turn.preempted and turn.chosen:
            assert min(job.order for job in turn.preempted) > min(job.order for job in turn.chosen)

    load = Load([(40, 60, 0)] * 4, watch, slots=300, token_budget=200).run()
    assert any(gone), "memory was never short"
    assert 0 not in [order for orders in gone for order in orders]
    assert load.ended[0] == min(load.ended.values())


def test_steps_that_cut_prompts_are_whole_tiles() -> None:
    tokens: list[int] = []
    Load([(1000, 5, 0), (5, 40, 0)], lambda s, t: tokens.append(t.tokens), token_budget=100, tile_tokens=64).run()
    assert tokens[:10] == [64] * 10


def test_prefill_first_stalls_decodes_and_sarathi_does_not() -> None:
    def stalls(policy: str) -> int:
        seen: list[int] = []

        def watch(scheduler: Scheduler, turn: Turn) -> None:
            seen.append(sum(job.is_decoding and job not in turn.chosen for job in scheduler.running))

        Load([(8, 40, 0), (100, 4, 5), (100, 4, 9)], watch, policy=policy, token_budget=32).run()
        return sum(seen)

    assert stalls("sarathi") == 0
    assert stalls("prefill-first") == 2


def test_request_level_lets_nobody_join() -> None:
    def watch(scheduler: Scheduler, turn: Turn) -> None:
        joined = [job for job in turn.chosen if not job.computed_tokens]
        assert not joined or len(joined) == len(scheduler.running)

    load = Load([(10, 30, 0), (10, 5, 0), (10, 5, 3)], watch, policy="request-level").run()
    assert load.first_token[2] > load.ended[0]


def test_the_shortest_prompt_comes_first_until_another_has_waited() -> None:
    short = [(10, 2, step) for step in range(200)]
    both = {
        order: Load([(300, 2, 0), (20, 2, 0), *short], order=order, token_budget=10, max_running=1).run()
        for order in ORDERS
    }
    assert both["spf"].first_token[1] < both["spf"].first_token[0]
    assert both["fcfs"].first_token[0] < both["fcfs"].first_token[1]
    # 300 tokens against 10: passed by those that come within 290 / 15 = 20 s of it, by none that comes later
    assert both["spf"].first_token[0] < min(both["spf"].first_token[i + 2] for i in range(25, 200))


@pytest.mark.parametrize("name", ["token_budget", "chunk_tokens", "max_running", "tile_tokens"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least 1"):
        Limits(**{name: 0})


def test_names_are_known() -> None:
    with pytest.raises(UsageError, match=r"no policy 'saratti'.*did you mean 'sarathi'"):
        get_policy("saratti")
    with pytest.raises(UsageError, match="no queue order 'fifo', known are fcfs, spf"):
        get_order("fifo")
