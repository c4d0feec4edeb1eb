"""The sweep: no point beats another, the ends are there, the order and the points are the same every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moa.errors import InfeasibleError, UsageError
from moa.optimize.milp import MilpWorker
from moa.optimize.pareto import non_dominated, pareto_front
from moa.optimize.problem import AssignmentProblem, Target, check
from moa.optimize.solve import solve

MakeProblem = Callable[..., AssignmentProblem]


@pytest.mark.parametrize("limit", [None, 2])
def test_front_is_feasible_non_dominated_and_deterministic(
    make_realistic: MakeProblem, worker: MilpWorker, limit: int | None
) -> None:
    problem = make_realistic(0, 3, 4, 0.3, limit, max_rules=24)
    front = pareto_front(problem, worker=worker)
    losses = np.array([a.losses for a in front])
    assert len(front) >= 3
    for own, assignment in zip(losses, front, strict=True):
        check(problem, assignment)
        assert not ((losses <= own).all(axis=1) & (losses < own).any(axis=1)).any()
    assert losses.tolist() == sorted(losses.tolist())
    again = pareto_front(problem, worker=worker)
    assert [a.rules.tolist() for a in again] == [a.rules.tolist() for a in front]


def test_front_reaches_the_best_of_each_length(make_realistic: MakeProblem, worker: MilpWorker) -> None:
    problem = make_realistic(1, 3, 4, 0.3, max_rules=30)
    front = pareto_front(problem, rel_gap=1e-6, worker=worker)
    for index in range(3):
        alone = solve(problem, Target.at_length(problem, index), worker=worker)
        assert min(a.losses[index] for a in front) <= alone.losses[index] * 1.02


def test_one_length_is_one_solve(make_tiny: MakeProblem) -> None:
    front = pareto_front(make_tiny(0, lengths=1))
    assert len(front) == 1
    check(make_tiny(0, lengths=1), front[0])


def test_no_levels_gives_the_balance_and_the_ends(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    assert 1 <= len(pareto_front(make_tiny(1), levels=0, worker=worker)) <= 3


def test_front_says_when_the_budget_cannot_be_kept(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    problem = make_tiny(2)
    with pytest.raises(InfeasibleError):
        pareto_front(replace(problem, density_budget=(1e-4, 1e-4)), worker=worker)
    with pytest.raises(UsageError):
        pareto_front(problem, levels=-1, worker=worker)


def test_non_dominated_drops_equals_and_worse(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    base = solve(make_tiny(3), worker=worker)
    points = [replace(base, losses=np.array(p, dtype=float)) for p in ([1, 2], [2, 1], [2, 2], [1, 2], [1, 3])]
    assert [a.losses.tolist() for a in non_dominated(points)] == [[1, 2], [2, 1]]
    assert non_dominated(points)[0] is points[0]
