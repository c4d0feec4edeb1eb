"""Intervals and the records' own checks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moa.eval.records import RecallTask, Score, Spread, wilson


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_share_and_mirrors(counts):
    right, questions = counts
    low, high = wilson(right, questions)
    assert 0 <= low <= right / questions <= high <= 1
    assert low < high
    assert wilson(questions - right, questions) == pytest.approx((1 - high, 1 - low))


@given(st.integers(1, 500), st.integers(2, 9))
def test_more_questions_narrow_the_interval(questions, factor):
    few, many = wilson(questions // 2, questions), wilson(questions // 2 * factor, questions * factor)
    assert many[1] - many[0] < few[1] - few[0]


def test_the_interval_of_a_textbook():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 0) == (0, 1)


def test_impossible_scores_are_refused():
    with pytest.raises(ValidationError, match="3 right answers of 2 questions"):
        Score.of(right=3, questions=3, nll_sum=1, answer_tokens=3).model_validate(
            {**Score.of(2, 2, 1, 2).model_dump(), "right": 3}
        )


def test_a_task_asks_for_known_families():
    with pytest.raises(ValidationError, match="families"):
        RecallTask(families=("riddle",))
    with pytest.raises(ValidationError, match="families"):
        RecallTask(families=())


def test_a_spread_orders_its_values():
    assert Spread.of([3, 1, 2]) == Spread(median=2.0, minimum=1.0, maximum=3.0)
