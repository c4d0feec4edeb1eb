"""The uniform control keeps the same budgets, exactly, and is never better than the optimum."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import InfeasibleError, UsageError
from moa.optimize.baselines import uniform_assignment, uniform_rule
from moa.optimize.grid import span_table
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import AssignmentProblem, Target, fits_budgets
from moa.optimize.solve import solve
from moa.spans import BETA_ONE, DENSE, ElasticRule

MakeProblem = Callable[..., AssignmentProblem]


@given(st.lists(st.integers(128, 200_000), min_size=1, max_size=4), st.integers(1, 100), st.integers(1, 200))
def test_uniform_rule_is_the_longest_within_every_budget(lengths: list[int], percent: int, least: int) -> None:
    budgets = [percent / 100] * len(lengths)
    rooms = [Fraction(percent, 100) * n for n in lengths]
    try:
        rule = uniform_rule(lengths, budgets, least)
    except InfeasibleError:
        assert any(min(n, least) > room for n, room in zip(lengths, rooms, strict=True))
        return
    spans = span_table([rule], lengths, least)[:, 0].tolist()
    assert all(span <= room for span, room in zip(spans, rooms, strict=True))
    if rule.beta_fixed < BETA_ONE:
        longer = span_table([ElasticRule(0, (rule.beta_fixed + 1) / BETA_ONE)], lengths, 1)[:, 0].tolist()
        assert any(span > room for span, room in zip(longer, rooms, strict=True))


def test_uniform_rule_ends() -> None:
    assert uniform_rule([4096], [1.0], 128) == DENSE
    assert uniform_rule([4096], [0.5], 128) == ElasticRule(0, 0.5)
    with pytest.raises(InfeasibleError, match=r"0\.1 at 512 tokens"):
        uniform_rule([4096, 512], [0.1, 0.1], 128)
    with pytest.raises(UsageError):
        uniform_rule([4096], [], 128)


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_optimum_is_at_least_as_good_as_uniform(
    make_realistic: MakeProblem, worker: MilpWorker, limit: int | None
) -> None:
    problem = make_realistic(0, 4, 4, 0.5, limit)
    target = Target.balanced(problem)
    rules = uniform_assignment(problem)
    assert fits_budgets(problem, rules)
    assert len(np.unique(rules)) == 1
    assert np.isclose(target.value(problem.losses(rules)), 3.0)  # the scale is each length's own best uniform, here one
    assert solve(problem, target, worker=worker).value <= target.value(problem.losses(rules))
