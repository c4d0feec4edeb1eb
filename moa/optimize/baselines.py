"""Plans to compare with, made without a solver and at equal KV bytes: uniform, DuoAttention's split, a pyramid, dense.

Every baseline spends the whole budget at every budget length, to within one step of a span per head (one token at the
shortest length, or 1/65536 of the length), so that a comparison is never one of different sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import version
from math import floor
from typing import Literal, Protocol, get_args

import numpy as np

from moa.errors import InfeasibleError, UsageError, closest
from moa.optimize.problem import AssignmentProblem, Float64Array, Target, infeasible_text
from moa.plan import CreatedBy, ModelShape, Plan, SolverRecord
from moa.spans import BETA_ONE, DENSE, ElasticRule, Int64Array

Baseline = Literal["uniform", "duo", "pyramid", "dense"]
# The last layer's share of the mean budget in PyramidKV (arXiv 2406.02069; its released code's `beta`).
PYRAMID_BETA = 20
# DuoAttention deploys 64 sinks and 256 recent tokens (arXiv 2410.10819): a window of five times the sinks.
STREAMING_SINKS = 5
Rules = list[list[ElasticRule]]


class RuleLosses(Protocol):
    """What a baseline needs of a profile."""

    def rule_losses(self, rules: tuple[ElasticRule, ...]) -> Float64Array:
        """Predicted loss of every rule for every head at every length, float64 [E, L, HKV, R]."""
        ...


def baseline_plan(
    name: str,
    shape: ModelShape,
    density: float,
    lengths_tokens: Sequence[int],
    *,
    sink_tokens: int = 64,
    min_span_tokens: int = 128,
    profile: RuleLosses | None = None,
) -> Plan:
    """A baseline by name, within the density at every length; its `solver` record names it and claims no bound.

    Args:
        name: "uniform": one share of the length for all heads, StreamingLLM's plan. "duo": the heads that the profile
            finds most sensitive keep everything, the others sinks and a window. "pyramid": a share per layer that falls
            linearly, PyramidKV's budgets. "dense": everything; the density does not matter.
        shape: of the model.
        density: largest mean of span/n at each of `lengths_tokens`, in (0, 1].
        lengths_tokens: where the budget holds.
        sink_tokens, min_span_tokens: of the plan.
        profile: ranks the heads for "duo"; the others need none.

    Raises:
        UsageError: there is no such baseline, no lengths, a density outside (0, 1], or "duo" without a profile.
        InfeasibleError: `min_span_tokens` alone exceeds the budget at a length.
    """
    if name not in get_args(Baseline):
        raise UsageError(
            f"baselines are {', '.join(get_args(Baseline))}, got {name!r}{closest(name, get_args(Baseline))}"
        )
    if not 0 < density <= 1:
        raise UsageError(f"the density must lie in (0, 1], got {density}")
    rules = _rules(name, shape, density, lengths_tokens, sink_tokens, min_span_tokens, profile)
    plan = Plan(
        model=shape,
        sink_tokens=sink_tokens,
        min_span_tokens=min_span_tokens,
        rules=tuple(tuple((rule.alpha, rule.beta) for rule in layer) for layer in rules),
        solver=SolverRecord(name=name, status="baseline", milp_status="not needed", bound=None, gap_ratio=None),
        created_by=CreatedBy(moa=version("moa"), torch=version("torch"), transformers=version("transformers")),
    )
    fields = {field: getattr(plan, field) for field in Plan.model_fields}
    return Plan.model_validate({**fields, "sha256": "", "lengths": tuple(plan.at_length(n) for n in lengths_tokens)})


def _rules(
    name: str,
    shape: ModelShape,
    density: float,
    lengths: Sequence[int],
    sink_tokens: int,
    min_span_tokens: int,
    profile: RuleLosses | None,
) -> Rules:
    if name == "dense":
        return [[DENSE] * shape.kv_heads] * shape.layers
    if name == "pyramid":
        layers = pyramid_rules(shape.layers, lengths, density, min_span_tokens)
        return [[rule] * shape.kv_heads for rule in layers]
    if name == "uniform":
        rule = uniform_rule(lengths, (density,) * len(lengths), min_span_tokens)
        return [[rule] * shape.kv_heads] * shape.layers
    if profile is None:
        raise UsageError("the baseline 'duo' ranks heads by a profile; name one, such as OUT/profile.safetensors")
    window = streaming_window(lengths, density, sink_tokens, min_span_tokens)
    return duo_rules(head_sensitivity(profile, window), lengths, density, window)


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
    return _longest_share(_rooms(budget_lengths, density_budget, min_span_tokens))


def _rooms(lengths: Sequence[int], budgets: Sequence[float], min_span_tokens: int) -> list[tuple[int, int]]:
    """Every length with the tokens that a head may keep there on average; raises what `uniform_rule` says."""
    if not lengths or len(lengths) != len(budgets):
        raise UsageError(f"{len(lengths)} lengths need as many density budgets, got {len(budgets)}")
    rooms = [(n, floor(Fraction(str(budget)) * n)) for n, budget in zip(lengths, budgets, strict=True)]
    for (n, room), budget in zip(rooms, budgets, strict=True):
        if min(n, min_span_tokens) > room:
            raise InfeasibleError(
                f"no plan keeps the density budget {budget:g} at {n} tokens: min_span_tokens "
                f"({min_span_tokens}) exceeds the {room} tokens allowed; raise --density or lower --min-span-tokens"
            )
    return rooms


def _longest_share(rooms: Sequence[tuple[int, int]]) -> ElasticRule:
    """The longest rule (0, beta) whose span at every length `n` is at most `room`: pairs of (n, room)."""
    # ceil(beta * n) <= room for a whole number room exactly if beta * n <= room.
    return ElasticRule(0, min(room * BETA_ONE // n for n, room in rooms) / BETA_ONE)


def pyramid_rules(
    layers: int, lengths_tokens: Sequence[int], density: float, min_span_tokens: int
) -> tuple[ElasticRule, ...]:
    """One share of the length per layer, falling linearly from the first to the last: PyramidKV's budgets.

    As there, what every layer keeps anyway (the least span at the shortest length) is set aside, the last layer gets 1/20
    of the mean of the rest and the first what makes the mean right; where that is more than everything, the first layer
    is dense and the pyramid is flatter.

    Raises:
        UsageError: no lengths.
        InfeasibleError: `min_span_tokens` alone exceeds the budget.
    """
    _rooms(lengths_tokens, (density,) * len(lengths_tokens), min_span_tokens)
    mean, least = Fraction(str(density)), min(Fraction(min_span_tokens, min(lengths_tokens)), Fraction(1))
    last = least + (mean - least) / PYRAMID_BETA
    first = 2 * mean - last
    if first > 1:
        first, last = Fraction(1), 2 * mean - 1
    shares = [first + (last - first) * i / max(1, layers - 1) for i in range(layers)] if layers > 1 else [mean]
    return tuple(_longest_share([(n, floor(share * n)) for n in lengths_tokens]) for share in shares)


def streaming_window(lengths_tokens: Sequence[int], density: float, sink_tokens: int, min_span_tokens: int) -> int:
    """Tokens that a streaming head keeps, sinks included: five times the sinks as in DuoAttention.

    At most half of the mean budget at the shortest length, as no head could be dense otherwise; never below the least
    span.

    Raises:
        UsageError: no lengths.
        InfeasibleError: `min_span_tokens` alone exceeds the budget.
    """
    _, room = min(_rooms(lengths_tokens, (density,) * len(lengths_tokens), min_span_tokens))
    return max(min_span_tokens, min(STREAMING_SINKS * sink_tokens, room // 2))


def head_sensitivity(profile: RuleLosses, window_tokens: int) -> Float64Array:
    """Predicted loss of giving each head a window, every length counting the same, float64 [L, HKV]."""
    losses = profile.rule_losses((ElasticRule(window_tokens, 0.0),))[..., 0]  # [E, L, HKV]
    scale = losses.mean(axis=(1, 2), keepdims=True)
    return np.asarray((losses / np.where(scale > 0, scale, 1.0)).sum(axis=0), dtype=np.float64)


def duo_rules(sensitivity: Float64Array, lengths_tokens: Sequence[int], density: float, window_tokens: int) -> Rules:
    """DuoAttention's split: the most sensitive heads dense, as many as the budgets allow, the others a window.

    What is left of the budget lengthens the windows, so that the bytes are equal at every length. With one length the
    window is fixed, as in DuoAttention; with several it must be a share of the length.

    Args:
        sensitivity: loss of each head under the window, float64 [L, HKV]; of equals the first is dense.
        lengths_tokens: where the budget holds.
        density: largest mean of span/n at each.
        window_tokens: the least window, sinks included; must fit the budget at every length.
    """
    heads = sensitivity.size
    rooms = [(n, floor(Fraction(str(density)) * n * heads)) for n in lengths_tokens]
    dense = min(_dense_heads(n, room, heads, window_tokens) for n, room in rooms)
    order = np.argsort(-sensitivity.ravel(), kind="stable")
    rules = [DENSE] * heads
    if dense < heads:
        left = [(n, min(n, (room - dense * n) // (heads - dense))) for n, room in rooms]
        streaming = ElasticRule(left[0][1], 0.0) if len(left) == 1 else _longest_share(left)
        for head in order[dense:].tolist():
            rules[head] = streaming
    width = sensitivity.shape[1]
    return [rules[i : i + width] for i in range(0, heads, width)]


def _dense_heads(n_tokens: int, room_tokens: int, heads: int, window_tokens: int) -> int:
    """The most heads that can be dense at one length while all others keep a window."""
    if window_tokens >= n_tokens:
        return heads
    return min(heads, (room_tokens - heads * window_tokens) // (n_tokens - window_tokens))


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
