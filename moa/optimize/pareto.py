"""Several evaluated lengths at once: a sweep over the trade-offs between their losses.

An epsilon-constraint (the loss at one length, the others limited) says where on the front a point shall lie; solving it as
it stands is hard, because limits leave little that a heuristic could find. Its Lagrangian multipliers turn the limits into
weights. The weighted problem is as easy as a single length's, its answer lies beside the point asked for, and with more
than a few heads the points that no weights reach lie closer together than predicted losses are right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from moa.errors import UsageError
from moa.optimize.instance import make_instance
from moa.optimize.lagrangian import relax
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import Assignment, AssignmentProblem, Float64Array, Target, by_layer, loss_scale
from moa.optimize.solve import solve

LEVELS = 3
# Predicted losses are not good to a thousandth, and the choice among the points is by true loss.
REL_GAP = 1e-3
TIME_LIMIT_S = 20.0
# The other lengths count a little, or the best plan for one length would take any of equals at the others.
SIDE_WEIGHT = 1e-2


def pareto_front(
    problem: AssignmentProblem,
    *,
    levels: int = LEVELS,
    rel_gap: float = REL_GAP,
    time_limit_s: float = TIME_LIMIT_S,
    worker: MilpWorker | None = None,
) -> list[Assignment]:
    """Assignments of which none is better than another at every evaluated length.

    Solved are: all lengths in balance; each length alone; and, for each length, `levels` times the same with weights on
    the others that bring their losses near a fraction of the way from their best to their worst among the former. That
    is 1 + E + E * levels solves, 13 for three lengths.

    Args:
        problem: losses, spans and budgets.
        levels: how many limits per primary length, at least 0.
        rel_gap, time_limit_s: of each solve.
        worker: a solver process to use and leave running; one for the whole sweep when None.

    Returns:
        Assignments sorted by their losses in the order of `loss_lengths`.

    Raises:
        InfeasibleError: no assignment keeps the budgets.
        UsageError: `levels` is negative.
    """
    if levels < 0:
        raise UsageError(f"levels must be at least 0, got {levels}")
    if worker is None:
        with MilpWorker() as own:
            return pareto_front(problem, levels=levels, rel_gap=rel_gap, time_limit_s=time_limit_s, worker=own)

    def run(target: Target) -> Assignment:
        return solve(problem, target, rel_gap=rel_gap, time_limit_s=time_limit_s, worker=worker, always_milp=False)

    free = np.full(len(problem.loss), np.inf)
    found = [run(Target.balanced(problem))]
    if len(problem.loss) == 1:
        return found
    found += [run(Target(weights, free)) for weights in _primary_weights(problem)]
    found += [run(weighted(problem, target, time_limit_s)) for target in _limited(problem, found, levels)]
    return non_dominated(found)


def weighted(problem: AssignmentProblem, target: Target, time_limit_s: float = TIME_LIMIT_S) -> Target:
    """The target without its limits, with their Lagrangian multipliers added to the weights."""
    instance = make_instance(by_layer(problem), target)
    limited = np.isfinite(target.limits)
    multipliers = relax(instance, deadline_s=time.monotonic() + time_limit_s).multipliers[len(problem.spans) :]
    # Rows are scaled to a largest entry of 1, and costs by the instance's scale.
    largest = np.abs(problem.loss[limited]).max(axis=(1, 2, 3))
    weights = target.weights.copy()
    weights[limited] += multipliers * instance.scale / np.where(largest > 0, largest, 1.0)
    return Target(weights, np.full(len(weights), np.inf))


def _primary_weights(problem: AssignmentProblem) -> Float64Array:
    """Weights [E, E]: row p counts length p fully and the others a little, in units of their scale."""
    count = len(problem.loss)
    return (np.eye(count) + SIDE_WEIGHT * (1 - np.eye(count))) / loss_scale(problem)


def _limited(problem: AssignmentProblem, found: list[Assignment], levels: int) -> Iterator[Target]:
    losses = np.stack([assignment.losses for assignment in found])  # [found, E]
    best, worst = losses.min(axis=0), losses.max(axis=0)
    for primary, weights in enumerate(_primary_weights(problem)):
        for level in range(1, levels + 1):
            limits = best + level / (levels + 1) * (worst - best)
            limits[primary] = np.inf
            yield Target(weights, limits)


def non_dominated(assignments: list[Assignment]) -> list[Assignment]:
    """Those that no other one matches or beats at every length, sorted by losses; the first of equal losses stays."""
    unique = {tuple(a.losses.tolist()): a for a in reversed(assignments)}
    losses = np.array(list(unique))  # [U, E]
    beaten = [bool(((losses <= own).all(axis=1) & (losses < own).any(axis=1)).any()) for own in losses]
    kept = [key for key, lost in zip(unique, beaten, strict=True) if not lost]
    return [unique[key] for key in sorted(kept)]
