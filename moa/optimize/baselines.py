"""Uniform plans, the control for every compressed one: the same rule for every head, within the same budgets."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor

import numpy as np

from moa.errors import InfeasibleError, UsageError
from moa.optimize.problem import AssignmentProblem, Target, infeasible_text
from moa.spans import BETA_ONE, ElasticRule, Int64Array


def uniform_rule(budget_lengths: Sequence[int], density_budget: Sequence[float], min_span_tokens: int) -> ElasticRule:
    """The longest rule (0, beta) that, given to every head, keeps every density budget exactly: StreamingLLM's plan.

    Args:
        budget_lengths: in tokens.
        density_budget: largest span/n at each of them, in (0, 1].
        min_span_tokens: least span, sinks included.

    Raises:
        UsageError: no lengths, or not one budget per length.
        InfeasibleError: `min_span_tokens` alone exceeds a budget.
    """
    if not budget_lengths or len(budget_lengths) != len(density_budget):
        raise UsageError(f"{len(budget_lengths)} lengths need as many density budgets, got {len(density_budget)}")
    pairs = zip(budget_lengths, density_budget, strict=True)
    rooms = [(n, budget, floor(Fraction(str(budget)) * n)) for n, budget in pairs]
    for n, budget, room in rooms:
        if min(n, min_span_tokens) > room:
            raise InfeasibleError(
                f"no uniform plan keeps the density budget {budget:g} at {n} tokens: min_span_tokens "
                f"({min_span_tokens}) exceeds the {room} tokens allowed; raise --density or lower --min-span-tokens"
            )
    # ceil(beta * n) <= room for a whole number room exactly if beta * n <= room.
    return ElasticRule(0, min(room * BETA_ONE // n for n, _, room in rooms) / BETA_ONE)


def uniform_assignment(problem: AssignmentProblem, target: Target | None = None) -> Int64Array:
    """The best single rule among the candidates for every head, rule indices int64 [L, HKV].

    Raises:
        InfeasibleError: no single rule keeps every budget.
    """
    target = target or Target.balanced(problem)
    fits = (problem.spans * problem.heads <= problem.room_tokens[:, None]).all(axis=0)  # [R]
    if not fits.any():
        raise InfeasibleError(infeasible_text(problem))
    values = target.weights @ problem.loss.sum(axis=(1, 2))  # [R]
    best = int(np.argmin(np.where(fits, values, np.inf)))
    return np.full(problem.loss.shape[1:3], best, dtype=np.int64)
