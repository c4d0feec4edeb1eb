"""Intervals of differences: sound at the edges, right as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moa.eval.paired.statistics import mean_interval, paired_difference

shares = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=60))
def test_intervals_hold_the_difference_and_turn_with_the_sides(pairs):
    ours, theirs = zip(*pairs, strict=True)
    found, back = paired_difference(ours, theirs, bounded=True), paired_difference(theirs, ours, bounded=True)
    assert found.low <= found.value <= found.high
    assert found.low < found.high  # never sure, however much samples agree
    assert (found.value, found.low, found.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-12)
    assert (found.better, found.worse) == (back.worse, back.better)


@given(st.integers(1, 200), st.booleans())
def test_where_all_agree_the_interval_is_wilsons(count, right):
    found = paired_difference([float(right)] * count, [float(right)] * count, bounded=True)
    half = 1.959964**2 / (count + 1.959964**2)
    assert (found.value, found.low, found.high) == pytest.approx((0, -half, half), abs=1e-6)
    assert found.p_value is None


def test_a_published_example():
    """Newcombe 1998, worked example: 36 right in both, 12 and 2 in one alone; method 10."""
    found = paired_difference([1.0] * 48 + [0.0] * 2, [1.0] * 36 + [0.0] * 12 + [1.0] * 2, bounded=True)
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_students_interval_and_tests_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(0.3, size=20)
    found, wanted = paired_difference(a, b, bounded=False), stats.ttest_rel(a, b)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval()))
    assert found.p_value == pytest.approx(wanted.pvalue)
    binary = paired_difference([1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], bounded=True)
    assert binary.p_value == pytest.approx(stats.binomtest(5, 6).pvalue)


def test_one_loss_has_no_interval():
    found = paired_difference([1.0], [2.0], bounded=False)
    assert (found.value, found.low, found.high, found.p_value) == (-1, -math.inf, math.inf, None)


@pytest.mark.parametrize("rates", [(0.9, 0.05, 0.02), (0.5, 0.1, 0.1), (0.3, 0.3, 0.05), (0.0, 0.05, 0.9)])
def test_intervals_cover_the_truth(rates):
    """Of 400 drawn tables about 95 % must hold the true difference; so few draws leave two or three points of noise."""
    rng, count, held = np.random.default_rng(1), 60, 0
    both, ours, theirs = rates
    for kind in rng.choice(4, size=(400, count), p=[both, ours, theirs, 1 - sum(rates)]):
        found = paired_difference(kind <= 1, (kind == 0) | (kind == 2), bounded=True)
        held += found.low <= ours - theirs <= found.high
    assert held / 400 > 0.925


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=8))
def test_the_mean_of_intervals_is_narrower_than_their_mean(parts):
    found = [(value, value - down, value + up) for value, down, up in parts]
    mean, low, high = mean_interval(found)
    assert mean == pytest.approx(sum(value for value, _, _ in found) / len(found))
    assert mean - low <= sum(value - down for value, down, _ in found) / len(found) + 1e-12
    assert high - mean <= sum(up - value for value, _, up in found) / len(found) + 1e-12
