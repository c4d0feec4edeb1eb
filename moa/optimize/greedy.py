"""Feasible assignments without a solver: start short, lengthen where a token buys most, then swap.

A move gives one head, or all heads of a layer that share a rule, another rule. Moves are scored all at once, [L, HKV, R]
or [L, R, R]; nothing here loops over heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moa.optimize.instance import BoolArray, Instance, chosen
from moa.optimize.problem import Float64Array
from moa.spans import Int64Array

# A round of lengthening applies, layer by layer, every best move that is at least this good relative to the best.
BULK_RATIO = 0.7
SWAP_CANDIDATES = 64
SWAP_ROUNDS = 200
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Moves:
    """Scored moves: cost change [K], row changes [M, K], whether allowed [K], which layer they change [K].

    The first L*HKV*R moves change one head, the other L*R*R one rule of a layer.
    """

    cost: Float64Array
    rows: Float64Array
    allowed: BoolArray
    layer: Int64Array


def never(cost: float) -> bool:
    """No cost is good enough: improve for as long as there is a way to."""
    return False


def greedy(
    instance: Instance, deadline_s: float = np.inf, good_enough: Callable[[float], bool] = never
) -> Int64Array | None:
    """Rule indices [L, HKV] that keep every row and the rules-per-layer limit, or None if none was found."""
    start = np.full(instance.cost.shape[:2], instance.shortest, dtype=np.int64)
    return repair(instance, start, deadline_s, good_enough)


def repair(
    instance: Instance,
    picks: Int64Array,
    deadline_s: float = np.inf,
    good_enough: Callable[[float], bool] = never,
) -> Int64Array | None:
    """The nearest assignment that keeps every row, improved; None if the way there was not found.

    `picks` [L, HKV] must keep the rules-per-layer limit. After `deadline_s`, on the clock of `time.monotonic`, nothing is
    improved any more, and the way to an assignment that keeps the rows is given up. Nothing is swapped any more either
    once the cost is `good_enough`.
    """
    feasible = _shorten(instance, picks.copy(), deadline_s)
    if feasible is None:
        return None
    return _swap(instance, _lengthen(instance, feasible, deadline_s), deadline_s, good_enough)


def _moves(instance: Instance, picks: Int64Array) -> Moves:
    cost = instance.cost - chosen(instance.cost, picks)[:, :, None]  # [L, HKV, R]
    rows = instance.rows - np.stack([chosen(row, picks) for row in instance.rows])[..., None]  # [M, L, HKV, R]
    allowed, group = _allowed(instance, picks)
    layers, kv_heads, count = cost.shape
    layer = np.repeat(np.arange(layers), kv_heads * count)
    flat = Moves(cost.ravel(), rows.reshape(len(rows), -1), allowed.ravel(), layer)
    return flat if group is None else _with_groups(flat, cost, rows, group)


def _allowed(instance: Instance, picks: Int64Array) -> tuple[BoolArray, Float64Array | None]:
    """Moves of one head that keep the rules-per-layer limit [L, HKV, R]; who uses which rule [L, R, HKV]."""
    changed: BoolArray = np.asarray(np.arange(instance.cost.shape[2]) != picks[:, :, None])
    if instance.rule_limit is None:
        return changed, None
    uses = ~changed  # [L, HKV, R]
    count = uses.sum(axis=1)  # [L, R]
    leaves = np.take_along_axis(count, picks, axis=1) == 1  # [L, HKV]
    distinct = (count > 0).sum(axis=1)[:, None, None] + (count == 0)[:, None, :] - leaves[:, :, None]
    return changed & (distinct <= instance.rule_limit), uses.transpose(0, 2, 1).astype(np.float64)


def _with_groups(flat: Moves, cost: Float64Array, rows: Float64Array, group: Float64Array) -> Moves:
    used = np.broadcast_to(np.asarray(group.max(axis=2) > 0)[:, :, None], (*group.shape[:2], group.shape[1]))
    together = used & ~np.eye(group.shape[1], dtype=bool)
    return Moves(
        np.concatenate([flat.cost, (group @ cost).ravel()]),
        np.concatenate([flat.rows, (group @ rows).reshape(len(rows), -1)], axis=1),
        np.concatenate([flat.allowed, together.ravel()]),
        np.concatenate([flat.layer, np.repeat(np.arange(len(group)), group.shape[1] ** 2)]),
    )


def _apply(picks: Int64Array, rules: int, move: int) -> None:
    """Make one move in place; `rules` is R."""
    if move < picks.size * rules:
        picks.reshape(-1)[move // rules] = move % rules
        return
    layer, pair = divmod(move - picks.size * rules, rules * rules)
    picks[layer][picks[layer] == pair // rules] = pair % rules


def _shorten(instance: Instance, picks: Int64Array, deadline_s: float) -> Int64Array | None:
    """Cheapest moves per unit of violation until every row is kept."""
    rules = instance.cost.shape[2]
    for _ in range(8 * picks.size):
        usage = instance.usage(picks)
        over = np.maximum(usage - instance.rhs, 0).sum()
        if (usage <= instance.rhs + ROUNDING).all():
            return picks
        if time.monotonic() > deadline_s:
            return None
        moves = _moves(instance, picks)
        after = np.maximum(usage[:, None] + moves.rows - instance.rhs[:, None], 0).sum(axis=0)
        useful = moves.allowed & (after < over - ROUNDING)
        if not useful.any():
            return None
        price = np.where(useful, np.maximum(moves.cost, 1e-12) / np.maximum(over - after, 1e-12), np.inf)
        _apply(picks, rules, int(np.argmin(price)))
    return None


def _lengthen(instance: Instance, picks: Int64Array, deadline_s: float) -> Int64Array:
    """Moves that lower the cost, best per unit of budget first, until none fits."""
    usage = instance.usage(picks)
    for _ in range(8 * picks.size):
        if time.monotonic() > deadline_s:
            break
        moves = _moves(instance, picks)
        left = instance.rhs + ROUNDING - usage
        fits = moves.allowed & (moves.cost < -ROUNDING) & (moves.rows <= left[:, None]).all(axis=0)
        if not fits.any():
            break
        price = np.maximum(moves.rows, 0).sum(axis=0) + 1e-9
        worth = np.where(fits, -moves.cost / price, 0.0)
        usage = _apply_bulk(instance, picks, moves, worth, usage)
    return picks


def _apply_bulk(
    instance: Instance, picks: Int64Array, moves: Moves, worth: Float64Array, usage: Float64Array
) -> Float64Array:
    """One move per layer (per head without a rules-per-layer limit), those nearly as good as the best; the new usage."""
    rules = instance.cost.shape[2]
    limited = instance.rule_limit is not None
    parts = np.arange(len(worth)) // rules if not limited else moves.layer
    good = np.flatnonzero(worth >= BULK_RATIO * worth.max())
    order = good[np.argsort(-worth[good], kind="stable")]
    _, first = np.unique(parts[order], return_index=True)
    for move in order[np.sort(first)].tolist():
        after = usage + moves.rows[:, move]
        if (after <= instance.rhs + ROUNDING).all():
            _apply(picks, rules, move)
            usage = after
    return usage


def _swap(instance: Instance, picks: Int64Array, deadline_s: float, good_enough: Callable[[float], bool]) -> Int64Array:
    """Pairs of moves that together lower the cost and fit: one that wins much, one that pays for it."""
    for _ in range(SWAP_ROUNDS):
        if good_enough(instance.cost_of(picks)):
            break
        better = _best_swap(instance, picks) if time.monotonic() <= deadline_s else None
        if better is None:
            break
        picks = _lengthen(instance, better, deadline_s)
    return picks


def _best_swap(instance: Instance, picks: Int64Array) -> Int64Array | None:
    moves = _moves(instance, picks)
    left = instance.rhs + ROUNDING - instance.usage(picks)
    before, rules = instance.cost_of(picks), instance.cost.shape[2]
    single = np.flatnonzero(moves.allowed)
    wins = single[moves.cost[single] < -ROUNDING]
    for win in wins[np.argsort(moves.cost[wins], kind="stable")][:SWAP_CANDIDATES].tolist():
        total = moves.cost[single] + moves.cost[win]
        fits = (moves.rows[:, single] + moves.rows[:, [win]] <= left[:, None]).all(axis=0) & (total < -ROUNDING)
        if fits.any():
            pay = int(single[np.argmin(np.where(fits, total, np.inf))])
            trial = _both(picks, rules, win, pay)
            if _holds(instance, trial) and instance.cost_of(trial) < before - ROUNDING:
                return trial
    return None


def _both(picks: Int64Array, rules: int, first: int, second: int) -> Int64Array:
    trial = picks.copy()
    _apply(trial, rules, first)
    _apply(trial, rules, second)
    return trial


def _holds(instance: Instance, picks: Int64Array) -> bool:
    limit = instance.rule_limit
    few = limit is None or max(len(set(layer)) for layer in picks.tolist()) <= limit
    return few and bool((instance.usage(picks) <= instance.rhs + ROUNDING).all())
