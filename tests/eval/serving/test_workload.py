"""Requests are drawn as the distributions say, the same ones for a seed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import UsageError
from moa.eval.serving.cases import get_case, get_cases
from moa.eval.serving.workload import FIRST_TOKEN, Lengths, Workload

WORKLOAD = Workload(Lengths(40, 100, 2, 300), Lengths(8, 16), 50, vocabulary=30, rate=4.0)


@given(
    st.integers(1, 60),
    st.sampled_from([0.5, 3.0, math.inf]),
    st.sampled_from([0.3, 1.0, 10.0]),
    st.integers(1, 7),
    st.integers(0, 9),
    st.sampled_from([None, 2, 60]),
)
def test_requests_keep_what_was_asked(count, rate, burstiness, burst, seed, context):
    asked = replace(WORKLOAD, count=count, rate=rate, burstiness=burstiness, burst=burst, context_tokens=context)
    loads = asked.requests(seed)
    assert len(loads) == count
    assert loads == asked.requests(seed)
    assert all(a.due_s <= b.due_s for a, b in pairwise(loads))
    assert loads[0].due_s == 0
    for load in loads:
        assert load.prompt
        assert load.output_tokens >= 1
        assert all(FIRST_TOKEN <= token < asked.vocabulary for token in load.prompt)
        assert context is None or len(load.prompt) + load.output_tokens <= context
    assert all(a.due_s == b.due_s for i, (a, b) in enumerate(pairwise(loads)) if (i + 1) % burst)


@given(st.integers(0, 20), st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_rate_changes_when_and_not_what(seed, a, b):
    first, second = (replace(WORKLOAD, rate=rate).requests(seed) for rate in (a, b))
    assert [load.prompt for load in first] == [load.prompt for load in second]
    np.testing.assert_allclose([x.due_s * a for x in first], [x.due_s * b for x in second])


def test_distributions():
    asked = replace(WORKLOAD, count=4000, prompts=Lengths(200, 500), outputs=Lengths(7, 7))
    loads = asked.requests(1)
    lengths = [len(load.prompt) for load in loads]
    assert np.median(lengths) == pytest.approx(200, rel=0.06)
    assert np.percentile(lengths, 90) == pytest.approx(500, rel=0.06)
    assert {load.output_tokens for load in loads} == {7}
    gaps = np.diff([load.due_s for load in loads])
    assert gaps.mean() == pytest.approx(0.25, rel=0.01)
    assert gaps.std() == pytest.approx(0.25, rel=0.08)  # exponential: spread and mean are the same
    burstier = np.diff([load.due_s for load in replace(asked, burstiness=0.25).requests(1)])
    assert burstier.std() == pytest.approx(0.5, rel=0.1)  # gamma of shape 1/4: twice the mean


@pytest.mark.parametrize("rate", [2.0, math.inf])
def test_waves_arrive_together_among_others(rate):
    ask = get_case("demo").long
    loads = ask.requests(300, rate, 0, 4096)
    assert len(loads) == ask.count + ask.waves * ask.wave
    assert all(a.due_s <= b.due_s for a, b in pairwise(loads))
    waves = [load for load in loads if load.output_tokens == ask.wave_tokens]
    dues = sorted({load.due_s for load in waves})
    assert len(waves) == ask.waves * ask.wave
    if math.isinf(rate):
        assert dues == [0.0]
    else:
        np.testing.assert_allclose(np.diff(dues), len(loads) / rate / ask.waves)
        assert loads[-1].due_s < 1.7 * len(loads) / rate


@pytest.mark.parametrize(
    "change",
    [{"count": 0}, {"rate": 0.0}, {"burstiness": 0.0}, {"burst": 0}, {"max_concurrency": 0}, {"vocabulary": 3}],
)
def test_refuses_workloads_that_cannot_be(change):
    with pytest.raises(UsageError, match="workload"):
        replace(WORKLOAD, **change)


@pytest.mark.parametrize("numbers", [(10, 5), (0, 5), (10, 20, 11), (10, 20, 1, 9)])
def test_refuses_lengths_that_cannot_be(numbers):
    with pytest.raises(UsageError, match="lengths"):
        Lengths(*numbers)


def test_models_of_one_name_are_refused():
    assert [case.name for case in get_cases(["demo", "a/b"])] == ["demo", "a/b"]
    with pytest.raises(UsageError, match="same one"):
        get_cases(["demo", "demo"])
