"""The search finds what there is, for any promise that is kept up to some rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.eval.serving.capacity import MOST_TRIALS, find_capacity

RATES = st.floats(0.02, 50.0)


@given(RATES, RATES, st.floats(1.02, 2.0))
def test_brackets_a_threshold(threshold, guess, within):
    tried = []

    def holds(rate):
        tried.append(rate)
        return rate <= threshold

    found = find_capacity(holds, guess, most=1000.0, within=within)
    assert found.trials == len(tried) <= MOST_TRIALS
    assert found.holds <= threshold < found.fails
    assert found.holds in (0, *tried)
    if found.trials < MOST_TRIALS:
        assert found.fails <= within * found.holds


@given(RATES, RATES)
def test_nothing_is_tried_above_what_is_possible(most, guess):
    tried = []
    found = find_capacity(lambda rate: not tried.append(rate), guess, most=most)
    assert max(tried) <= most
    assert found.holds == most or found.trials == MOST_TRIALS
    assert math.isinf(found.fails)


def test_latency_that_grows_towards_saturation():
    """P99 of an M/M/1 queue, ln(100) / (mu - rate): the rate at which it is 1 s is known."""
    mu, limit_s = 20.0, 1.0
    exact = mu - math.log(100) / limit_s
    found = find_capacity(lambda rate: math.log(100) / (mu - rate) <= limit_s, 1.0, most=mu - 1e-6, within=1.01)
    assert found.holds <= exact < found.fails <= 1.01 * found.holds


def test_a_subject_that_never_keeps_its_promise_ends_the_search():
    found = find_capacity(lambda rate: False, 1.0, most=10.0)
    assert (found.holds, found.trials) == (0.0, MOST_TRIALS)


@pytest.mark.parametrize(("guess", "most", "within"), [(0, 1, 2), (1, 0, 2), (1, math.inf, 2), (1, 1, 1)])
def test_refuses_searches_that_cannot_end(guess, most, within):
    with pytest.raises(ValueError, match="capacity search"):
        find_capacity(bool, guess, most=most, within=within)
