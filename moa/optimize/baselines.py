"""Plans to compare with, made without a solver and at equal KV bytes: uniform, DuoAttention's split, a pyramid, dense.

Every baseline spends the whole budget at every budget length, to within one step of a span per head (one token at the
shortest length, or 1/65536 of the length), so that a comparison is never one of different sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import version
from itertools import combinations
from math import floor
from typing import Literal, Protocol, get_args

import numpy as np

from moa.errors import InfeasibleError, UsageError, closest
from moa.optimize.problem import AssignmentProblem, Float64Array, Target, infeasible_text
from moa.plan import CreatedBy, ModelShape, Plan, SolverRecord
from moa.spans import BETA_BITS, BETA_ONE, DENSE, ElasticRule, Int64Array, LengthMode

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
    density: float | Sequence[float],
    lengths_tokens: Sequence[int],
    *,
    sink_tokens: int = 64,
    min_span_tokens: int = 128,
    profile: RuleLosses | None = None,
    length_mode: LengthMode = "running",
) -> Plan:
    """A baseline by name, within the density at every length; its `solver` record names it and claims no bound.

    Args:
        name: "uniform": one share of the length for all heads, StreamingLLM's plan. "duo": the heads that the profile
            finds most sensitive keep everything, the others sinks and a window. "pyramid": a share per layer that falls
            linearly, PyramidKV's budgets. "dense": everything; the density does not matter.
        shape: of the model.
        density: largest mean of span/n at each of `lengths_tokens`, in (0, 1]: one for all, or one each, which rules
            with an alpha follow as nearly as they can, exactly at two lengths.
        lengths_tokens: where the budget holds.
        sink_tokens, min_span_tokens: of the plan.
        profile: ranks the heads for "duo"; the others need none.
        length_mode: "pinned" keeps one window from a text's start to its end, as StreamingLLM and DuoAttention do.

    Raises:
        UsageError: there is no such baseline, no lengths, a density outside (0, 1], or "duo" without a profile.
        InfeasibleError: `min_span_tokens` alone exceeds the budget at a length.
    """
    if name not in get_args(Baseline):
        raise UsageError(
            f"baselines are {', '.join(get_args(Baseline))}, got {name!r}{closest(name, get_args(Baseline))}"
        )
    densities = tuple(density) if isinstance(density, Sequence) else (density,) * len(lengths_tokens)
    for wanted in densities:
        if not 0 < wanted <= 1:
            raise UsageError(f"the density must lie in (0, 1], got {wanted}")
    rules = _rules(name, shape, densities, lengths_tokens, sink_tokens, min_span_tokens, profile)
    plan = Plan(
        model=shape,
        length_mode=length_mode,
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
    densities: Sequence[float],
    lengths: Sequence[int],
    sink_tokens: int,
    min_span_tokens: int,
    profile: RuleLosses | None,
) -> Rules:
    if name == "dense":
        return [[DENSE] * shape.kv_heads] * shape.layers
    if name == "pyramid":
        layers = pyramid_rules(shape.layers, lengths, densities, min_span_tokens)
        return [[rule] * shape.kv_heads for rule in layers]
    if name == "uniform":
        rule = _longest_rule(_rooms(lengths, densities, min_span_tokens))
        return [[rule] * shape.kv_heads] * shape.layers
    if profile is None:
        raise UsageError("the baseline 'duo' ranks heads by a profile; name one, such as OUT/profile.safetensors")
    window = streaming_window(lengths, densities, sink_tokens, min_span_tokens)
    return duo_rules(head_sensitivity(profile, window), lengths, densities, window)


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


def _longest_rule(rooms: Sequence[tuple[int, int]]) -> ElasticRule:
    """The rule whose span at every length `n` is at most `room` and wastes the least share of the worst one.

    A share of the length where that wastes no more than its own rounding and one token; else a line through two lengths.
    """
    share = _longest_share(rooms)
    if all(room - share.beta * n <= 1 + n / min(m for m, _ in rooms) + n / BETA_ONE for n, room in rooms):
        return share
    slopes = [Fraction(s - r, m - n) for (n, r), (m, s) in combinations(sorted(rooms), 2) if m > n]
    betas = [floor(min(max(slope, Fraction(0)), Fraction(1)) * BETA_ONE) for slope in slopes]
    lines = [ElasticRule(min(room + (-beta * n >> BETA_BITS) for n, room in rooms), beta / BETA_ONE) for beta in betas]
    return min(
        (share, *lines), key=lambda rule: max(1 - (rule.alpha + rule.beta * n) / max(1, room) for n, room in rooms)
    )


def pyramid_rules(
    layers: int, lengths_tokens: Sequence[int], densities: Sequence[float], min_span_tokens: int
) -> tuple[ElasticRule, ...]:
    """One share of the length per layer, falling linearly from the first to the last: PyramidKV's budgets.

    As there, what every layer keeps anyway (the least span, at the shortest length where one density holds for all) is
    set aside, the last layer gets 1/20 of the mean of the rest and the first what makes the mean right; where that is
    more than everything, the first layer is dense and the pyramid is flatter.

    Raises:
        UsageError: no lengths.
        InfeasibleError: `min_span_tokens` alone exceeds the budget.
    """
    _rooms(lengths_tokens, densities, min_span_tokens)
    alike = min(lengths_tokens) if len({*densities}) == 1 else None  # one density: one share for all lengths
    shares = [  # [lengths][layers]
        _pyramid(layers, Fraction(str(density)), min(Fraction(min_span_tokens, alike or n), Fraction(1)))
        for n, density in zip(lengths_tokens, densities, strict=True)
    ]
    rooms = [
        [(n, floor(share * n)) for n, share in zip(lengths_tokens, at, strict=True)] for at in zip(*shares, strict=True)
    ]
    return tuple(_longest_rule(layer) for layer in rooms)


def _pyramid(layers: int, mean: Fraction, least: Fraction) -> list[Fraction]:
    """Shares of one length, layer by layer, of mean `mean`."""
    if layers == 1:
        return [mean]
    last = least + (mean - least) / PYRAMID_BETA
    first = 2 * mean - last
    if first > 1:
        first, last = Fraction(1), 2 * mean - 1
    return [first + (last - first) * i / (layers - 1) for i in range(layers)]


def streaming_window(
    lengths_tokens: Sequence[int], densities: Sequence[float], sink_tokens: int, min_span_tokens: int
) -> int:
    """Tokens that a streaming head keeps, sinks included: five times the sinks as in DuoAttention.

    At most half of the mean budget at the length that allows the fewest tokens, as no head could be dense otherwise;
    never below the least span.

    Raises:
        UsageError: no lengths.
        InfeasibleError: `min_span_tokens` alone exceeds the budget.
    """
    room = min(room for _, room in _rooms(lengths_tokens, densities, min_span_tokens))
    return max(min_span_tokens, min(STREAMING_SINKS * sink_tokens, room // 2))


def head_sensitivity(profile: RuleLosses, window_tokens: int) -> Float64Array:
    """Predicted loss of giving each head a window, every length counting the same, float64 [L, HKV]."""
    losses = profile.rule_losses((ElasticRule(window_tokens, 0.0),))[..., 0]  # [E, L, HKV]
    scale = losses.mean(axis=(1, 2), keepdims=True)
    return np.asarray((losses / np.where(scale > 0, scale, 1.0)).sum(axis=0), dtype=np.float64)


def duo_rules(
    sensitivity: Float64Array, lengths_tokens: Sequence[int], densities: Sequence[float], window_tokens: int
) -> Rules:
    """DuoAttention's split: the most sensitive heads dense, as many as the budgets allow, the others a window.

    What is left of the budget lengthens the windows, so that the bytes are equal at every length. With one length the
    window is fixed, as in DuoAttention; with several it grows with the length, so fewer heads are dense where
    a longer text would leave the others less.

    Args:
        sensitivity: loss of each head under the window, float64 [L, HKV]; of equals the first is dense.
        lengths_tokens: where the budget holds.
        densities: largest mean of span/n at each.
        window_tokens: the least window, sinks included; must fit the budget at every length.
    """
    heads = sensitivity.size
    rooms = [(n, floor(Fraction(str(d)) * n * heads)) for n, d in zip(lengths_tokens, densities, strict=True)]
    rooms.sort()
    dense = min(_dense_heads(n, room, heads, window_tokens) for n, room in rooms)
    while (windows := _windows(rooms, heads, dense)) != sorted(windows) and dense:
        dense -= 1
    order = np.argsort(-sensitivity.ravel(), kind="stable")
    rules = [DENSE] * heads
    if dense < heads:
        left = [(n, window) for (n, _), window in zip(rooms, windows, strict=True)]
        streaming = ElasticRule(windows[0], 0.0) if len(left) == 1 else _longest_rule(left)
        for head in order[dense:].tolist():
            rules[head] = streaming
    width = sensitivity.shape[1]
    return [rules[i : i + width] for i in range(0, heads, width)]


def _windows(rooms: Sequence[tuple[int, int]], heads: int, dense: int) -> list[int]:
    """Tokens that `dense` heads leave each of the others, at every length."""
    return [min(n, (room - dense * n) // max(1, heads - dense)) for n, room in rooms]


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
