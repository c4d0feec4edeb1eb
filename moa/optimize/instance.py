"""A problem and its target in the form that all methods solve: one cost, some rows with a right-hand side, numbers near 1."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moa.optimize.problem import LIMIT_TOLERANCE, AssignmentProblem, Float64Array, Target
from moa.spans import Int64Array

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Instance:
    """min sum cost[h, pick[h]]  subject to  sum rows[m, h, pick[h]] <= rhs[m]  and `rule_limit` rules per layer.

    Costs are shifted so that the best rule of every head costs 0, and scaled so that heads differ by 1 on average;
    rows are scaled to a largest entry of 1. Only so do the solver's absolute tolerances mean something: losses come in
    any unit, and sums of spans reach 1e9 tokens.

    Args:
        cost: float64 [L, HKV, R].
        rows: budgets, then loss limits, float64 [M, L, HKV, R].
        rhs: float64 [M].
        rule_limit: distinct rules per layer, None for no limit.
        offset, scale: value of the target = offset + scale * cost.
    """

    cost: Float64Array
    rows: Float64Array
    rhs: Float64Array
    rule_limit: int | None
    offset: float
    scale: float

    def value(self, cost: float) -> float:
        """The target's value for a sum of costs."""
        return self.offset + self.scale * cost

    def cost_of(self, picks: Int64Array) -> float:
        """Sum of costs of rule indices [L, HKV]."""
        return float(chosen(self.cost, picks).sum())

    def usage(self, picks: Int64Array) -> Float64Array:
        """Left-hand side of every row, float64 [M]."""
        return np.array([chosen(row, picks).sum() for row in self.rows])

    @cached_property
    def shortest(self) -> int:
        """The rule that, given to every head, comes closest to keeping every row."""
        excess = self.rows.sum(axis=(1, 2)) - self.rhs[:, None]  # [M, R]
        return int(np.argmin(np.maximum(excess, 0).sum(axis=0) + 1e-9 * excess.sum(axis=0)))


def chosen(values: Float64Array, picks: Int64Array) -> Float64Array:
    """`values` [L, HKV, R] at rule indices [L, HKV]: [L, HKV]."""
    return np.take_along_axis(values, picks[:, :, None], axis=2)[:, :, 0]


def make_instance(problem: AssignmentProblem, target: Target) -> Instance:
    """Scale a problem for solving."""
    weighted = np.tensordot(target.weights, problem.loss, axes=1)  # [L, HKV, R]
    least = weighted.min(axis=2, keepdims=True)
    shifted = weighted - least
    scale = float(shifted.max(axis=2).mean()) or 1.0
    rows, rhs = _rows(problem, target)
    largest = np.abs(rows).max(axis=(1, 2, 3))
    largest[largest == 0] = 1.0
    return Instance(
        cost=shifted / scale,
        rows=rows / largest[:, None, None, None],
        rhs=rhs / largest,
        rule_limit=problem.rule_limit,
        offset=float(least.sum()),
        scale=scale,
    )


def undominated(instance: Instance) -> BoolArray:
    """Columns [L, HKV, R] for which no other rule is as good in cost and in every row.

    Under a rules-per-layer limit the other rule must be as good for every head of the layer, as the head may not be free
    to take it. Of equals the first stays.
    """
    count = instance.cost.shape[2]
    earlier = np.tri(count, k=-1, dtype=bool)  # [R, R]: the column's rule comes before the row's
    keep = np.empty(instance.cost.shape, dtype=bool)
    for layer in range(len(keep)):
        numbers = np.concatenate([instance.cost[None, layer], instance.rows[:, layer]])  # [1 + M, HKV, R]
        own, other = numbers[..., :, None], numbers[..., None, :]
        as_good, better = (other <= own).all(axis=0), (other < own).any(axis=0)  # [HKV, R, R]
        if instance.rule_limit is not None:
            as_good, better = as_good.all(axis=0, keepdims=True), better.any(axis=0, keepdims=True)
        keep[layer] = ~(as_good & (better | earlier)).any(axis=2)
    return keep


def _rows(problem: AssignmentProblem, target: Target) -> tuple[Float64Array, Float64Array]:
    shape = problem.loss.shape[1:]
    spans = np.broadcast_to(problem.spans[:, None, None, :], (len(problem.spans), *shape))
    limited = np.isfinite(target.limits)
    limits = target.limits[limited]
    rows = np.concatenate([spans.astype(np.float64), problem.loss[limited]])  # [M, L, HKV, R]
    # Half the tolerance of the check, so that a limit that was reached before can be reached again.
    return rows, np.concatenate([problem.room_tokens, limits + LIMIT_TOLERANCE / 2 * np.abs(limits)])
