"""The assignment problem (one rule per KV head), what it is solved for, its answer, and the check of an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from moa.errors import InfeasibleError, MoaError, UsageError
from moa.spans import Int64Array

Float64Array = npt.NDArray[np.float64]
# A loss limit is a float; the solver and our sum of the same numbers differ in the last digits.
LIMIT_TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class AssignmentProblem:
    """Which rule each KV head shall get.

    Args:
        loss: predicted loss of giving a head a rule, at each evaluated length, float64 [E, L, HKV, R].
        spans: span of each rule at each budget length, tokens, int64 [C, R].
        budget_lengths: the budget lengths, tokens, C of them.
        density_budget: largest mean over heads of span/n at each budget length, in (0, 1], C of them.
        max_rules_per_layer: at most so many distinct rules in one layer; None for no limit.
        loss_lengths: the evaluated lengths, tokens, E of them.
        per_layer: all KV heads of a layer get one rule.

    Raises:
        UsageError: shapes that do not fit, numbers that are not finite, spans outside [1, n], budgets outside (0, 1].
    """

    loss: Float64Array
    spans: Int64Array
    budget_lengths: tuple[int, ...]
    density_budget: tuple[float, ...]
    max_rules_per_layer: int | None
    loss_lengths: tuple[int, ...]
    per_layer: bool = False

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        if self.loss.ndim != 4 or self.loss.dtype != np.float64 or 0 in self.loss.shape:
            raise UsageError(
                f"loss must be float64 [E, L, HKV, R], none of them 0; got {self.loss.dtype} {self.loss.shape}"
            )
        wanted = (len(self.budget_lengths), self.loss.shape[3])
        if self.spans.dtype != np.int64 or self.spans.shape != wanted or not self.budget_lengths:
            raise UsageError(f"spans must be int64 [C, R] = {wanted}; got {self.spans.dtype} {self.spans.shape}")
        if len(self.density_budget) != wanted[0]:
            raise UsageError(f"{wanted[0]} budget lengths need as many density budgets, got {len(self.density_budget)}")
        if len(self.loss_lengths) != self.loss.shape[0]:
            raise UsageError(f"loss has {self.loss.shape[0]} lengths, loss_lengths names {len(self.loss_lengths)}")

    def _check_values(self) -> None:
        if not np.isfinite(self.loss).all():
            raise UsageError(f"loss must be finite, {int((~np.isfinite(self.loss)).sum())} entries are not")
        n = np.array(self.budget_lengths, dtype=np.int64)[:, None]
        if (self.spans < 1).any() or (self.spans > n).any():
            raise UsageError("every span must lie in [1, n] tokens of its budget length n")
        if not all(0 < budget <= 1 for budget in self.density_budget):
            raise UsageError(f"density budgets must lie in (0, 1], got {self.density_budget}")
        if self.max_rules_per_layer is not None and self.max_rules_per_layer < 1:
            raise UsageError(f"max_rules_per_layer must be at least 1 or None, got {self.max_rules_per_layer}")

    @property
    def heads(self) -> int:
        """L * HKV."""
        return int(self.loss.shape[1] * self.loss.shape[2])

    @property
    def rule_limit(self) -> int | None:
        """`max_rules_per_layer`, or None where it cannot bind."""
        limit = self.max_rules_per_layer
        return None if limit is None or limit >= min(self.loss.shape[2:]) else limit

    @property
    def room_tokens(self) -> Int64Array:
        """floor(budget * n * heads) of every budget length, exact, int64 [C].

        The budget is the decimal number that it prints as: 0.3 of 1000 tokens is 300, although the float is below 0.3.
        """
        pairs = zip(self.density_budget, self.budget_lengths, strict=True)
        return np.array([floor(Fraction(str(budget)) * n * self.heads) for budget, n in pairs], dtype=np.int64)

    def used_tokens(self, rules: Int64Array) -> Int64Array:
        """Sum of spans at every budget length of rule indices [..., HKV], int64 [C]."""
        counts = np.bincount(rules.ravel(), minlength=self.loss.shape[3])
        return self.spans @ counts

    def losses(self, rules: Int64Array) -> Float64Array:
        """Summed loss at every evaluated length of rule indices [L, HKV], float64 [E]."""
        chosen: Float64Array = np.take_along_axis(self.loss, rules[None, :, :, None], axis=3)
        return np.asarray(chosen.sum(axis=(1, 2, 3)))


@dataclass(frozen=True, eq=False)
class Target:
    """What is minimised: `weights @ loss` over the evaluated lengths, while each loss stays within its limit.

    Args:
        weights: not negative, one of them positive, float64 [E].
        limits: upper bound of the loss at each evaluated length, `inf` for none, float64 [E].

    Raises:
        UsageError: anything else.
    """

    weights: Float64Array
    limits: Float64Array

    def __post_init__(self) -> None:
        if self.weights.ndim != 1 or self.weights.shape != self.limits.shape:
            raise UsageError(f"weights {self.weights.shape} and limits {self.limits.shape} must both be [E]")
        if not np.isfinite(self.weights).all() or (self.weights < 0).any() or not self.weights.any():
            raise UsageError(f"weights must be finite, not negative and not all zero, got {self.weights.tolist()}")
        if np.isnan(self.limits).any() or (self.limits == -np.inf).any():
            raise UsageError(f"limits must be numbers or inf, got {self.limits.tolist()}")

    @classmethod
    def balanced(cls, problem: AssignmentProblem) -> Target:
        """Sum over lengths of loss / `loss_scale`: every length counts the same."""
        return cls(1 / loss_scale(problem), np.full(len(problem.loss), np.inf))

    @classmethod
    def at_length(cls, problem: AssignmentProblem, index: int, limits: Float64Array | None = None) -> Target:
        """The loss at one evaluated length, with limits on the others."""
        weights = np.zeros(len(problem.loss))
        weights[index] = 1.0
        return cls(weights, np.full(len(weights), np.inf) if limits is None else limits)

    def value(self, losses: Float64Array) -> float:
        """`weights @ losses`."""
        return float(self.weights @ losses)

    def keeps_limits(self, losses: Float64Array) -> bool:
        """Whether no loss exceeds its limit by more than rounding."""
        finite = np.isfinite(self.limits)
        slack = LIMIT_TOLERANCE * np.abs(self.limits[finite]) + np.finfo(float).tiny
        return bool((losses[finite] <= self.limits[finite] + slack).all())


@dataclass(frozen=True, eq=False)
class Assignment:
    """One rule per KV head, and how good it is.

    Args:
        rules: rule indices, int64 [L, HKV].
        losses: summed loss at every evaluated length, float64 [E].
        densities: mean span/n at every budget length, float64 [C].
        value: what was minimised, `target.weights @ losses`.
        bound: no assignment has a smaller value (`-inf` if unknown).
        gap_ratio: (value - bound) / |value|, 0 when both are 0.
        status: "optimal" if the gap is within the tolerance asked for, else "feasible".
        solver: who made this assignment: "highs", "lagrangian" or "greedy".
        milp_status: how the MILP ended: "optimal", "time_limit", "infeasible", "killed after 3.0 s", "failed: ...",
            "not needed".
        solve_s: wall-clock seconds of the whole solve.
    """

    rules: Int64Array
    losses: Float64Array
    densities: Float64Array
    value: float
    bound: float
    gap_ratio: float
    status: str
    solver: str
    milp_status: str
    solve_s: float


def loss_scale(problem: AssignmentProblem) -> Float64Array:
    """A positive size of the loss at each evaluated length, float64 [E].

    It is the loss of the best uniform assignment (one rule for every head) within the budgets; where no single rule
    keeps the budgets, or that loss is 0, the mean size of a loss times the number of heads; 1 where all are 0.
    """
    totals = problem.loss.sum(axis=(1, 2))  # [E, R]
    fits = (problem.spans * problem.heads <= problem.room_tokens[:, None]).all(axis=0)  # [R]
    uniform = np.abs(totals[:, fits].min(axis=1)) if fits.any() else np.zeros(len(totals))
    mean = np.abs(problem.loss).mean(axis=(1, 2, 3)) * problem.heads
    scale = np.where(uniform > 1e-9 * mean, uniform, mean)
    return np.where(scale > 0, scale, 1.0)


def by_layer(problem: AssignmentProblem) -> AssignmentProblem:
    """The same problem with each layer as one head, if it has one rule per layer; as it is otherwise.

    Exact: HKV * s <= floor(HKV * y) for a whole number s just where s <= floor(y).
    """
    if not problem.per_layer:
        return problem
    return replace(problem, loss=problem.loss.sum(axis=2, keepdims=True), max_rules_per_layer=None, per_layer=False)


def most_rules(problem: AssignmentProblem) -> int | None:
    """How many distinct rules a layer may have, None for no limit."""
    return 1 if problem.per_layer else problem.max_rules_per_layer


def fits_budgets(problem: AssignmentProblem, rules: Int64Array) -> bool:
    """Whether rule indices [L, HKV] keep every budget and the rules-per-layer limit; exact integers."""
    limit = most_rules(problem)
    few = limit is None or max(len(set(layer)) for layer in rules.tolist()) <= limit
    return few and bool((problem.used_tokens(rules) <= problem.room_tokens).all())


def check(problem: AssignmentProblem, assignment: Assignment, target: Target | None = None) -> None:
    """Recompute an assignment from integer spans and compare with everything it claims.

    Raises:
        MoaError: a budget, the rules-per-layer limit or a loss limit is broken, or a stated number is wrong.
    """
    rules = assignment.rules
    _, layers, kv_heads, count = problem.loss.shape
    if rules.dtype != np.int64 or rules.shape != (layers, kv_heads) or rules.min() < 0 or rules.max() >= count:
        _wrong(f"rules must be int64 [{layers}, {kv_heads}] in [0, {count}), got {rules.dtype} {rules.shape}")
    _check_budgets(problem, assignment)
    limit = most_rules(problem)
    for layer, row in enumerate(rules.tolist()):
        if limit is not None and len(set(row)) > limit:
            _wrong(f"layer {layer} uses {len(set(row))} distinct rules, at most {limit} are allowed")
    losses = problem.losses(rules)
    if not np.allclose(losses, assignment.losses, rtol=1e-9, atol=0):
        _wrong(f"losses are {losses.tolist()}, the assignment says {assignment.losses.tolist()}")
    if target is not None and not target.keeps_limits(losses):
        _wrong(f"losses {losses.tolist()} exceed the limits {target.limits.tolist()}")
    if target is not None and not np.isclose(target.value(losses), assignment.value, rtol=1e-9, atol=0):
        _wrong(f"the value is {target.value(losses)}, the assignment says {assignment.value}")


def _check_budgets(problem: AssignmentProblem, assignment: Assignment) -> None:
    used = problem.used_tokens(assignment.rules)
    for n, tokens, room in zip(problem.budget_lengths, used.tolist(), problem.room_tokens.tolist(), strict=True):
        if tokens > room:
            _wrong(f"at {n} tokens the spans add up to {tokens}, the budget allows {room}")
    if not np.allclose(densities(problem, assignment.rules), assignment.densities, rtol=1e-12, atol=0):
        _wrong(f"densities are {densities(problem, assignment.rules).tolist()}, not {assignment.densities.tolist()}")


def densities(problem: AssignmentProblem, rules: Int64Array) -> Float64Array:
    """Mean over heads of span/n at every budget length, float64 [C]."""
    return problem.used_tokens(rules) / (np.array(problem.budget_lengths, dtype=np.float64) * problem.heads)


def _wrong(what: str) -> NoReturn:
    raise MoaError(f"the optimizer's answer is wrong: {what}; this is a bug in moa, please report it")


def check_reachable(problem: AssignmentProblem) -> None:
    """Compare every budget with the shortest rule at its length.

    Raises:
        InfeasibleError: a budget is below what the shortest rule needs; names the tightest length and the way out.
    """
    least = problem.spans.min(axis=1)  # [C]
    if (least * problem.heads > problem.room_tokens).any():
        raise InfeasibleError(infeasible_text(problem))


def infeasible_text(problem: AssignmentProblem) -> str:
    """Why no assignment keeps the budgets: the tightest length, what is possible there, what was asked."""
    least = problem.spans.min(axis=1) / np.array(problem.budget_lengths, dtype=np.float64)
    ratio = least / np.array(problem.density_budget)
    tight = int(np.argmax(ratio))
    n, asked = problem.budget_lengths[tight], problem.density_budget[tight]
    shortest = int(problem.spans[tight].min())
    alone = least[tight] > asked
    together = "" if alone else "; the budgets cannot be kept at all lengths together, this one is the tightest"
    return (
        f"no plan keeps the density budget {asked:g} at {n} tokens: the shortest rule keeps {shortest} tokens there, "
        f"a density of {least[tight]:.4g}{together}. Raise --density to at least {_round_up(least[tight])}, "
        "lower --min-span-tokens, or leave out the short lengths"
    )


def _round_up(ratio: float) -> str:
    return f"{min(1.0, np.ceil(ratio * 1e4) / 1e4):g}"
