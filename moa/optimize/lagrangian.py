"""A lower bound, near-feasible assignments and removable rules from Lagrangian relaxation of the few coupling rows.

With a multiplier on each row, what remains decomposes per layer: every head takes its cheapest rule, or, with a limit
of one or two rules per layer, the layer takes its best single rule or pair out of all of them. For larger limits the
bound ignores the limit. Any multipliers >= 0 give a valid bound; Kelley's cutting planes in a moving box find the best.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from moa.optimize.instance import Instance, chosen
from moa.optimize.problem import Float64Array
from moa.spans import Int64Array

ITERATIONS = 60
KEPT_CANDIDATES = 6
BOX_START = 1.0
BOX_GROWTH = 4.0
DUAL_TOLERANCE = 1e-6
MULTIPLIER_CEILING = 1e6
EXCHANGE_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What the relaxation knows.

    Args:
        bound: no feasible assignment costs less (instance cost).
        multipliers: of the rows, float64 [M].
        candidates: rule indices [L, HKV] within the rules-per-layer limit, nearly keeping the rows.
        forced: least cost of any feasible assignment that gives this head this rule, float64 [L, HKV, R].
    """

    bound: float
    multipliers: Float64Array
    candidates: tuple[Int64Array, ...]
    forced: Float64Array


@dataclass(frozen=True, eq=False)
class _Point:
    multipliers: Float64Array
    value: float
    slope: Float64Array
    picks: Int64Array


def relax(instance: Instance, iterations: int = ITERATIONS, deadline_s: float = np.inf) -> Relaxation:
    """Maximise the Lagrangian bound of an instance; never fails, and deterministic if it ends before the deadline.

    `deadline_s` is on the clock of `time.monotonic`; what was found by then is valid, only not the best bound.
    """
    points = [_evaluate(instance, np.zeros(len(instance.rhs)))]
    best, radius = points[0], BOX_START
    for _ in range(iterations):
        if time.monotonic() > deadline_s:
            break
        proposal, promise, at_edge = _master(points, best, radius)
        if promise - best.value <= DUAL_TOLERANCE * max(1.0, abs(best.value)):
            if not at_edge or radius >= MULTIPLIER_CEILING:
                break
            radius *= BOX_GROWTH
            continue
        point = _evaluate(instance, proposal)
        points.append(point)
        if point.value > best.value:
            best, radius = point, radius * (BOX_GROWTH if at_edge else 1.0)
    return Relaxation(best.value, best.multipliers, _candidates(instance, points), _forced(instance, best))


def _reduced(instance: Instance, multipliers: Float64Array) -> Float64Array:
    return instance.cost + np.tensordot(multipliers, instance.rows, axes=1)  # [L, HKV, R]


def _evaluate(instance: Instance, multipliers: Float64Array) -> _Point:
    reduced = _reduced(instance, multipliers)
    picks = _cheapest(reduced, instance.rule_limit)
    value = float(chosen(reduced, picks).sum() - multipliers @ instance.rhs)
    return _Point(multipliers, value, instance.usage(picks) - instance.rhs, picks)


def _cheapest(reduced: Float64Array, limit: int | None) -> Int64Array:
    """Rule indices [L, HKV] of least reduced cost; the limit is kept for 1 and 2, ignored above."""
    if limit == 1:
        best = reduced.sum(axis=1).argmin(axis=1)
        return np.repeat(best[:, None], reduced.shape[1], axis=1)
    if limit == 2:
        return np.stack([_cheapest_pair(layer) for layer in reduced])
    return np.asarray(reduced.argmin(axis=2), dtype=np.int64)


def _cheapest_pair(reduced: Float64Array) -> Int64Array:
    """Rule indices [HKV] of one layer's best pair; `reduced` is [HKV, R]."""
    first, second = np.triu_indices(reduced.shape[1], 1)
    best = int(np.minimum(reduced[:, first], reduced[:, second]).sum(axis=0).argmin())
    pair = np.array([first[best], second[best]])
    return np.asarray(pair[reduced[:, pair].argmin(axis=1)], dtype=np.int64)


def _master(points: list[_Point], best: _Point, radius: float) -> tuple[Float64Array, float, bool]:
    """The multipliers that the cuts promise most for, inside the box; the promise; whether the box binds."""
    slopes = np.stack([p.slope for p in points])  # [P, M]
    heights = np.array([p.value - p.slope @ p.multipliers for p in points])
    low = np.maximum(best.multipliers - radius, 0)
    high = np.minimum(best.multipliers + radius, MULTIPLIER_CEILING)
    answer = linprog(
        c=np.r_[np.zeros(slopes.shape[1]), -1.0],
        A_ub=np.c_[-slopes, np.ones(len(points))],
        b_ub=heights,
        bounds=[*zip(low.tolist(), high.tolist(), strict=True), (None, None)],
        method="highs",
    )
    if answer.x is None:
        return best.multipliers, best.value, False
    found = np.clip(answer.x[:-1], low, high)
    at_edge = bool(((found >= high - 1e-9) | ((found <= low + 1e-9) & (low > 0))).any())
    return found, float(answer.x[-1]), at_edge


def _candidates(instance: Instance, points: list[_Point]) -> tuple[Int64Array, ...]:
    """Assignments of the points with the highest bounds, within the rules-per-layer limit, each once."""
    order = sorted(range(len(points)), key=lambda i: (-points[i].value, i))
    seen: dict[bytes, Int64Array] = {}
    for i in order[:KEPT_CANDIDATES]:
        picks = points[i].picks
        if instance.rule_limit is not None and instance.rule_limit > 2:
            picks = _within_limit(_reduced(instance, points[i].multipliers), instance.rule_limit)
        seen.setdefault(picks.tobytes(), picks)
    return tuple(seen.values())


def _within_limit(reduced: Float64Array, limit: int) -> Int64Array:
    """Rule indices [L, HKV]: a layer gains the rule that helps most, `limit` times; then each is exchanged in turn."""
    layers = np.arange(len(reduced))
    sets = np.zeros((len(reduced), limit), dtype=np.int64)
    offers = np.full((*reduced.shape[:2], limit), np.inf)
    for step in range((1 + EXCHANGE_ROUNDS) * limit):
        slot = step % limit
        others = np.delete(offers, slot, axis=2).min(axis=2)  # [L, HKV]
        sets[:, slot] = np.minimum(others[:, :, None], reduced).sum(axis=1).argmin(axis=1)
        offers[:, :, slot] = reduced[layers, :, sets[:, slot]]
    return np.take_along_axis(sets, offers.argmin(axis=2), axis=1)


def _forced(instance: Instance, best: _Point) -> Float64Array:
    """The bound at the best multipliers, were one head forced to one rule: [L, HKV, R]."""
    reduced = _reduced(instance, best.multipliers)
    if instance.rule_limit == 1:
        total = reduced.sum(axis=1)  # [L, R]
        extra = np.repeat((total - total.min(axis=1, keepdims=True))[:, None, :], reduced.shape[1], axis=1)
    elif instance.rule_limit == 2:
        extra = np.stack([_forced_pair(layer) for layer in reduced])
    else:
        extra = reduced - reduced.min(axis=2, keepdims=True)
    return best.value + extra


def _forced_pair(reduced: Float64Array) -> Float64Array:
    """Extra cost of one layer, were one head forced to one rule of a pair: [HKV, R]."""
    count = reduced.shape[1]
    total = np.minimum(reduced[:, :, None], reduced[:, None, :]).sum(axis=0)  # [R, R]
    least = total[np.triu_indices(count, 1)].min()
    extra = np.empty_like(reduced)
    for head, own in enumerate(reduced):
        # The head pays its own price for rule r, whatever the second rule of the pair would have saved it.
        extra[head] = (total - np.minimum(own[:, None], own)).min(axis=1) + own - least
    return extra
