"""The one door: solve an assignment problem, always with an answer that keeps the budgets, and say how good it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np

from moa.errors import InfeasibleError, ResourceError, UsageError
from moa.optimize.greedy import greedy, never, repair
from moa.optimize.instance import BoolArray, Instance, make_instance, undominated
from moa.optimize.lagrangian import Relaxation, relax
from moa.optimize.milp import MilpAnswer, MilpWorker, solve_milp
from moa.optimize.problem import (
    Assignment,
    AssignmentProblem,
    Target,
    by_layer,
    check,
    check_reachable,
    densities,
    fits_budgets,
    infeasible_text,
)
from moa.spans import Int64Array

REL_GAP = 1e-4
TIME_LIMIT_S = 60.0
# The MILP improves what the heuristics find, it does not replace them: they go first, and get a second of even the
# shortest limit.
HEURISTICS_SHARE = 0.5
HEURISTICS_LEAST_S = 1.0
# Instance costs differ by 1 per head on average; below this, two assignments are equally good.
COST_TOLERANCE = 1e-9


def solve(
    problem: AssignmentProblem,
    target: Target | None = None,
    *,
    rel_gap: float = REL_GAP,
    time_limit_s: float = TIME_LIMIT_S,
    worker: MilpWorker | None = None,
    always_milp: bool = True,
) -> Assignment:
    """The assignment of least target value within budgets, limits and rules per layer.

    The Lagrangian relaxation gives a bound and, with the greedy method, a first assignment; rules that no better
    assignment can use are removed; the MILP (CVXPY, HiGHS) solves what is left. If it ends late or not at all, the best
    of the others is the answer, and `solver` and `milp_status` say so. Every answer was re-checked.

    Args:
        problem: losses, spans and budgets.
        target: what to minimise; `Target.balanced` when None.
        rel_gap: accepted (value - bound) / |value|.
        time_limit_s: wall-clock limit of all of this, kept to within two seconds: what is still running then is killed,
            and the best that was found is the answer.
        worker: a solver process to use and leave running; a new one for this call when None.
        always_milp: if False, end with the first assignment for which the relaxation alone proves `rel_gap`, and leave
            the MILP out; `milp_status` is then "not needed".

    Raises:
        InfeasibleError: no assignment keeps the budgets, or none of those keeps the target's loss limits.
        ResourceError: the time ran out before any assignment was found, which only loss limits or budgets that no
            single rule keeps can bring about.
    """
    started = time.monotonic()
    _check_arguments(rel_gap, time_limit_s)
    check_reachable(problem)
    target = target or Target.balanced(problem)
    if problem.per_layer:
        again = partial(solve, rel_gap=rel_gap, time_limit_s=time_limit_s, worker=worker, always_milp=always_milp)
        return _for_heads(problem, target, again(by_layer(problem), target))
    instance = make_instance(problem, target)
    heuristics_s = max(HEURISTICS_SHARE * time_limit_s, HEURISTICS_LEAST_S)
    relaxation = relax(instance, deadline_s=started + heuristics_s / 2)
    proved = partial(_is_proved, instance, relaxation, rel_gap)
    enough = never if always_milp else proved
    found = _heuristics(problem, target, instance, relaxation, started + heuristics_s, enough)
    if not always_milp and any(proved(instance.cost_of(picks)) for picks in found.values()):
        answer = MilpAnswer("not needed", None, -np.inf)
    else:
        with MilpWorker() if worker is None else nullcontext(worker) as process:
            left_s = time_limit_s - (time.monotonic() - started)
            answer = _milp(instance, relaxation, found, process, rel_gap, left_s)
    found = _with_milp(problem, target, instance, answer, found)
    if not found:
        raise _nothing_found(problem, target, answer, time_limit_s)
    bound = _bound(instance, relaxation, answer, found)
    result = _assignment(problem, target, instance, found, bound, answer, rel_gap, time.monotonic() - started)
    check(problem, result, target)
    return result


def _for_heads(problem: AssignmentProblem, target: Target, found: Assignment) -> Assignment:
    """The answer to `by_layer(problem)` as one to the problem itself, checked again there."""
    rules = np.repeat(found.rules, problem.loss.shape[2], axis=1)  # [L, HKV]
    losses = problem.losses(rules)
    result = replace(found, rules=rules, losses=losses, densities=densities(problem, rules), value=target.value(losses))
    check(problem, result, target)
    return result


def _check_arguments(rel_gap: float, time_limit_s: float) -> None:
    if not 0 <= rel_gap < 1:
        raise UsageError(f"rel_gap must lie in [0, 1), got {rel_gap}")
    if not 0 < time_limit_s < float("inf"):
        raise UsageError(f"time_limit_s must be a positive number of seconds, got {time_limit_s}")


def _acceptable(problem: AssignmentProblem, target: Target, picks: Int64Array | None) -> bool:
    return picks is not None and fits_budgets(problem, picks) and target.keeps_limits(problem.losses(picks))


def _heuristics(
    problem: AssignmentProblem,
    target: Target,
    instance: Instance,
    relaxation: Relaxation,
    deadline_s: float,
    good_enough: Callable[[float], bool],
) -> dict[str, Int64Array]:
    """The best repaired candidate of the relaxation and the greedy assignment, where they are acceptable.

    The first one that is `good_enough` is the only one. The greedy method starts from the shortest rule for every head:
    where that keeps everything there is an answer, however little time was left.
    """
    good = list[Int64Array]()
    for candidate in relaxation.candidates:
        picks = repair(instance, candidate, deadline_s, good_enough)
        if picks is None or not _acceptable(problem, target, picks):
            continue
        if good_enough(instance.cost_of(picks)):
            return {"lagrangian": picks}
        good.append(picks)
    found = {"lagrangian": min(good, key=instance.cost_of)} if good else {}
    plain = greedy(instance, deadline_s, good_enough)
    if plain is not None and _acceptable(problem, target, plain):
        found["greedy"] = plain
    return found


def _is_proved(instance: Instance, relaxation: Relaxation, rel_gap: float, cost: float) -> bool:
    """Whether an assignment of this cost is within `rel_gap` of the relaxation's bound."""
    value = instance.value(cost)
    return value - instance.value(relaxation.bound) <= rel_gap * abs(value)


def _milp(
    instance: Instance,
    relaxation: Relaxation,
    found: dict[str, Int64Array],
    worker: MilpWorker,
    rel_gap: float,
    time_left_s: float,
) -> MilpAnswer:
    keep = _useful(instance, relaxation, found)
    # The solver's own relative gap is relative to the shifted cost; the one asked for is relative to the value.
    costs = [relaxation.bound, *(instance.cost_of(picks) for picks in found.values())]
    abs_gap = max(rel_gap * min(abs(instance.value(cost)) for cost in costs) / instance.scale, COST_TOLERANCE)
    return solve_milp(instance, keep, worker, rel_gap=0.0, abs_gap=abs_gap, time_limit_s=time_left_s)


def _useful(instance: Instance, relaxation: Relaxation, found: dict[str, Int64Array]) -> BoolArray:
    """Columns [L, HKV, R] that a better assignment than the best found can use, and those of the best found."""
    if not found:
        return undominated(instance)
    best = min(found.values(), key=instance.cost_of)
    cost = instance.cost_of(best)
    keep = relaxation.forced <= cost + COST_TOLERANCE * max(1.0, cost)
    np.put_along_axis(keep, best[:, :, None], True, axis=2)
    return keep


def _with_milp(
    problem: AssignmentProblem, target: Target, instance: Instance, answer: MilpAnswer, found: dict[str, Int64Array]
) -> dict[str, Int64Array]:
    """The MILP's assignment in front of the others; repaired if the solver's tolerance broke a budget."""
    picks = answer.picks
    if picks is None:
        return found
    if not _acceptable(problem, target, picks):
        picks = repair(instance, picks) if _few_rules(problem, picks) else None
    return {"highs": picks, **found} if picks is not None and _acceptable(problem, target, picks) else found


def _few_rules(problem: AssignmentProblem, picks: Int64Array) -> bool:
    limit = problem.rule_limit
    return limit is None or max(len(set(layer)) for layer in picks.tolist()) <= limit


def _bound(instance: Instance, relaxation: Relaxation, answer: MilpAnswer, found: dict[str, Int64Array]) -> float:
    """Lower bound of the target's value: the MILP's holds for the columns it was given, all others cost more."""
    best = min(instance.cost_of(picks) for picks in found.values())
    return instance.value(min(best, max(relaxation.bound, answer.bound, 0.0)))


def _assignment(
    problem: AssignmentProblem,
    target: Target,
    instance: Instance,
    found: dict[str, Int64Array],
    bound: float,
    answer: MilpAnswer,
    rel_gap: float,
    solve_s: float,
) -> Assignment:
    # The first of equals wins, and the MILP comes first.
    solver = min(found, key=lambda name: round(instance.cost_of(found[name]) / COST_TOLERANCE))
    rules = found[solver].astype(np.int64)
    losses = problem.losses(rules)
    value = target.value(losses)
    bound = min(bound, value)
    gap = (value - bound) / abs(value) if value else 0.0 if bound == value else np.inf
    return Assignment(
        rules=rules,
        losses=losses,
        densities=densities(problem, rules),
        value=value,
        bound=bound,
        gap_ratio=gap,
        status="optimal" if gap <= max(rel_gap, 1e-6) else "feasible",
        solver=solver,
        milp_status=answer.status,
        solve_s=solve_s,
    )


def _nothing_found(
    problem: AssignmentProblem, target: Target, answer: MilpAnswer, time_limit_s: float
) -> InfeasibleError | ResourceError:
    limited = bool(np.isfinite(target.limits).any())
    if answer.status != "infeasible":
        return ResourceError(
            f"no assignment was found in {time_limit_s:g} s (MILP: {answer.status}); "
            "allow more time, raise --density, or loosen the loss limits"
        )
    if limited:
        limits = dict(zip(problem.loss_lengths, target.limits.tolist(), strict=True))
        return InfeasibleError(f"no assignment within the budgets keeps the loss limits {limits}; loosen them")
    return InfeasibleError(infeasible_text(problem))
