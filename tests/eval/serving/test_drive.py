"""The load generator: everything is sent when due and noted when it came, whatever the subject does."""

from __future__ import annotations

import math
from collections import deque
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import UsageError
from moa.eval.serving.drive import Event, drive
from moa.eval.serving.workload import Lengths, Load, Workload


class OneAtATime:
    """Serves requests one after the other, a second for each token."""

    name, about = "one at a time", MappingProxyType({})

    def __init__(self, clock, refused=()):
        self.clock, self.refused = clock, set(refused)
        self.waiting: deque[tuple[int, int]] = deque()
        self.taken: list[float] = []
        self.most = self.cancelled = 0

    def submit(self, request, load):
        if request in self.refused:
            raise ValueError("no")
        self.taken.append(self.clock())
        self.waiting.append((request, load.output_tokens))
        self.most = max(self.most, len(self.waiting))

    def events(self, until_s):
        if not self.waiting:
            self.clock.wait_until(until_s)
            return []
        request, left = self.waiting[0]
        self.clock.now += 1.0
        if left == 1:
            self.waiting.popleft()
        else:
            self.waiting[0] = request, left - 1
        return [Event(request, self.clock(), 1, is_last=left == 1)]

    def cancel_all(self):
        self.cancelled += len(self.waiting)
        self.waiting.clear()


def loads_of(*pairs):
    return [Load(due, (5, 6, 7), tokens) for due, tokens in pairs]


def test_times_count_from_when_a_request_was_due(fake_clock):
    """The second is due while the first runs and is taken later: it waited from its due time on."""
    fake_clock.now = 100.0
    run = drive(OneAtATime(fake_clock), loads_of((0.0, 3), (0.5, 2), (9.0, 1)))
    first, second, third = run.served
    assert (first.ttft_s, first.gaps_s, first.e2el_s) == (1.0, [1.0, 1.0], 3.0)
    assert (second.sent_s, second.ttft_s, second.e2el_s, second.tpot_s) == (0.5, 3.5, 4.5, 1.0)
    assert third.chunk_s == [10.0]
    assert run.duration_s == 10.0


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5)), min_size=1, max_size=12).map(sorted),
    st.one_of(st.none(), st.integers(1, 4)),
    st.sets(st.integers(0, 11)),
)
def test_every_request_ends_once(fake_clock_type, pairs, most, refused):
    clock = fake_clock_type()
    subject = OneAtATime(clock, refused)
    run = drive(subject, loads_of(*pairs), max_concurrency=most)
    assert len(run.served) == len(pairs)
    assert subject.most <= (most or len(pairs))
    for i, (one, (due, tokens)) in enumerate(zip(run.served, pairs, strict=True)):
        assert one.is_done
        assert bool(one.error) == (i in refused)
        assert one.output_tokens == (0 if i in refused else tokens)
        assert one.sent_s == pytest.approx(due + one.queue_s)
        assert one.queue_s >= 0
        assert most is not None or one.queue_s == 0
        assert all(at > one.sent_s for at in one.chunk_s)


def test_a_closed_loop_counts_from_when_there_was_room(fake_clock):
    run = drive(OneAtATime(fake_clock), loads_of((0.0, 2), (0.0, 2), (0.0, 2)), max_concurrency=1)
    assert [one.queue_s for one in run.served] == [0.0, 2.0, 4.0]
    assert [one.ttft_s for one in run.served] == [1.0, 1.0, 1.0]


def test_giving_up_cancels_what_is_open(fake_clock):
    subject = OneAtATime(fake_clock)
    run = drive(subject, loads_of((0.0, 9), (0.0, 9)), give_up=lambda one: one.output_tokens == 4)
    assert run.is_given_up
    assert run.duration_s == 4.0
    assert subject.cancelled == 2


def test_order_of_arrival_is_wanted(fake_clock):
    with pytest.raises(UsageError, match="order of arrival"):
        drive(OneAtATime(fake_clock), loads_of((1.0, 1), (0.0, 1)))


@pytest.mark.parametrize("policy", ["sarathi", "prefill-first", "orca", "request-level"])
@pytest.mark.parametrize("rate", [3.0, math.inf])
def test_simulated_policies_serve_everybody(simulated_type, policy, rate):
    asked = Workload(Lengths(100, 400, 1, 900), Lengths(9, 20), 40, 50, rate)
    run = drive(simulated_type(policy, 64), asked.requests(3))
    assert all(one.has_succeeded and one.output_tokens == one.wanted_tokens for one in run.served)
