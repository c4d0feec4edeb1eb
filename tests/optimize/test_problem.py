"""Validation of problems, exact room, and `check`, which must see every planted lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moa.errors import InfeasibleError, MoaError, UsageError
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import AssignmentProblem, Target, check, check_reachable, loss_scale
from moa.optimize.solve import solve

MakeProblem = Callable[..., AssignmentProblem]


@pytest.mark.parametrize(
    "change",
    [
        {"loss": np.zeros((2, 2, 2))},
        {"loss": np.zeros((2, 2, 2, 4), dtype=np.float32)},
        {"loss": np.full((2, 2, 2, 4), np.nan)},
        {"spans": np.zeros((2, 4), dtype=np.int64)},
        {"spans": np.full((2, 4), 10**6)},
        {"spans": np.ones((2, 3), dtype=np.int64)},
        {"density_budget": (0.5,)},
        {"density_budget": (0.5, 0.0)},
        {"density_budget": (0.5, float("nan"))},
        {"density_budget": (0.5, 1.5)},
        {"loss_lengths": (1000,)},
        {"max_rules_per_layer": 0},
    ],
)
def test_problem_refuses_what_does_not_fit(make_tiny: MakeProblem, change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(make_tiny(0), **change)


@pytest.mark.parametrize(
    ("weights", "limits"),
    [([0, 0], [1, 1]), ([-1, 2], [1, 1]), ([1], [1, 1]), ([1, np.nan], [1, 1]), ([1, 1], [1, np.nan])],
)
def test_target_refuses_what_cannot_be_meant(weights: list[float], limits: list[float]) -> None:
    with pytest.raises(UsageError):
        Target(np.array(weights, dtype=float), np.array(limits, dtype=float))


def test_room_counts_the_decimal_number_that_was_asked_for() -> None:
    """0.3 as a float lies below 3/10; a budget of 30 % of 1000 tokens is 300 tokens all the same."""
    loss, spans = np.zeros((1, 1, 10, 1)), np.full((1, 1), 300)
    problem = AssignmentProblem(loss, spans, (1000,), (0.3,), None, (1000,))
    assert problem.room_tokens.tolist() == [3000]
    check_reachable(problem)


def test_check_accepts_an_answer_and_catches_planted_lies(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    problem = make_tiny(5, limit=1)
    good = solve(problem, worker=worker)
    check(problem, good)
    over = np.full_like(good.rules, int(problem.spans[0].argmax()))
    mixed = good.rules.copy()
    mixed[0] = [0, 1]
    for lie in (
        replace(good, rules=over),
        replace(good, rules=mixed, losses=problem.losses(mixed)),
        replace(good, rules=good.rules[:1]),
        replace(good, rules=good.rules - 10),
        replace(good, rules=good.rules.astype(np.float64)),
        replace(good, losses=good.losses * (1 + 1e-6)),
        replace(good, densities=good.densities * 0.99),
    ):
        with pytest.raises(MoaError, match="optimizer's answer is wrong"):
            check(problem, lie)


def test_check_catches_one_token_too_many() -> None:
    loss, spans = np.zeros((1, 1, 2, 2)), np.array([[500, 501]])
    problem = AssignmentProblem(loss, spans, (1000,), (0.5,), None, (1000,))
    from_zero = solve(problem)
    rules = np.array([[0, 1]])
    with pytest.raises(MoaError, match="add up to 1001, the budget allows 1000"):
        check(problem, replace(from_zero, rules=rules))


def test_check_catches_a_broken_loss_limit(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    problem = make_tiny(3)
    answer = solve(problem, Target.at_length(problem, 0), worker=worker)
    below = answer.losses - 0.01 * np.abs(answer.losses)
    with pytest.raises(MoaError, match="exceed the limits"):
        check(problem, answer, Target.at_length(problem, 0, below))


def test_infeasible_names_the_tightest_length_and_the_way_out(make_realistic: MakeProblem) -> None:
    problem = replace(make_realistic(0, 2, 2, 0.5, lengths=(512, 4096)), density_budget=(0.05, 0.01))
    with pytest.raises(InfeasibleError) as error:
        solve(problem)
    text = str(error.value)
    assert "0.05 at 512 tokens" in text  # 128/512 = 0.25, five times the budget; at 4096 only 3.1 times
    assert "keeps 128 tokens" in text
    assert "--density to at least 0.25" in text
    assert "--min-span-tokens" in text


def test_budgets_that_exclude_each_other_are_infeasible(worker: MilpWorker) -> None:
    """Each length alone could be kept; both together cannot."""
    spans = np.array([[10, 900], [900, 10]])
    problem = AssignmentProblem(np.ones((1, 1, 2, 2)), spans, (1000, 1001), (0.1, 0.1), None, (1000,))
    with pytest.raises(InfeasibleError, match="together"):
        solve(problem, worker=worker)


def test_loss_scale_is_positive_even_for_zero_losses(make_tiny: MakeProblem) -> None:
    problem = make_tiny(0)
    assert (loss_scale(problem) > 0).all()
    assert (loss_scale(replace(problem, loss=np.zeros_like(problem.loss))) == 1).all()
