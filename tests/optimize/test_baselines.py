"""Baselines spend the same budgets, exactly, are what their papers say, and are never better than the optimum."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import InfeasibleError, UsageError
from moa.optimize.baselines import (
    baseline_plan,
    head_sensitivity,
    pyramid_rules,
    uniform_assignment,
    uniform_rule,
)
from moa.optimize.grid import span_table
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import AssignmentProblem, Float64Array, Target, fits_budgets
from moa.optimize.solve import solve
from moa.plan import ModelShape
from moa.spans import BETA_ONE, DENSE, ElasticRule

MakeProblem = Callable[..., AssignmentProblem]


@given(st.lists(st.integers(128, 200_000), min_size=1, max_size=4), st.integers(1, 100), st.integers(1, 200))
def test_uniform_rule_is_the_longest_within_every_budget(lengths: list[int], percent: int, least: int) -> None:
    budgets = [percent / 100] * len(lengths)
    rooms = [Fraction(percent, 100) * n for n in lengths]
    try:
        rule = uniform_rule(lengths, budgets, least)
    except InfeasibleError:
        assert any(min(n, least) > room for n, room in zip(lengths, rooms, strict=True))
        return
    spans = span_table([rule], lengths, least)[:, 0].tolist()
    assert all(span <= room for span, room in zip(spans, rooms, strict=True))
    if rule.beta_fixed < BETA_ONE:
        longer = span_table([ElasticRule(0, (rule.beta_fixed + 1) / BETA_ONE)], lengths, 1)[:, 0].tolist()
        assert any(span > room for span, room in zip(longer, rooms, strict=True))


def test_uniform_rule_ends() -> None:
    assert uniform_rule([4096], [1.0], 128) == DENSE
    assert uniform_rule([4096], [0.5], 128) == ElasticRule(0, 0.5)
    with pytest.raises(InfeasibleError, match=r"0\.1 at 512 tokens"):
        uniform_rule([4096, 512], [0.1, 0.1], 128)
    with pytest.raises(UsageError):
        uniform_rule([4096], [], 128)


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_optimum_is_at_least_as_good_as_uniform(
    make_realistic: MakeProblem, worker: MilpWorker, limit: int | None
) -> None:
    problem = make_realistic(0, 4, 4, 0.5, limit)
    target = Target.balanced(problem)
    rules = uniform_assignment(problem)
    assert fits_budgets(problem, rules)
    assert len(np.unique(rules)) == 1
    # each length's loss counts relative to that of its own best single rule, and there are three lengths
    assert 3.0 - 1e-9 <= target.value(problem.losses(rules)) < 3.2
    assert solve(problem, target, worker=worker).value <= target.value(problem.losses(rules))


SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=4, heads=8, kv_heads=4, head_dim=8)
LENGTHS = (512, 1024, 4096)


class KnownLosses:
    """A profile whose head (l, h) loses `loss[l, h]` under any window, and nothing when dense."""

    def __init__(self, loss: Float64Array) -> None:
        self.loss = loss

    def rule_losses(self, rules: tuple[ElasticRule, ...]) -> Float64Array:
        kept = np.array([0.0 if rule.is_dense else 1.0 for rule in rules])
        return np.stack([(n * self.loss)[:, :, None] * kept for n in LENGTHS])  # [E, L, HKV, R]


PROFILE = KnownLosses(np.random.default_rng(0).lognormal(0, 2, (SHAPE.layers, SHAPE.kv_heads)))


@pytest.mark.parametrize("name", ["uniform", "duo", "pyramid"])
@pytest.mark.parametrize("lengths", [(512,), (4096,), LENGTHS, (1000, 3001, 131072)])
@given(density=st.integers(4, 100).map(lambda percent: percent / 100))
def test_every_baseline_spends_the_whole_budget_and_no_more(
    name: str, lengths: tuple[int, ...], density: float
) -> None:
    plan = baseline_plan(name, SHAPE, density, lengths, sink_tokens=8, min_span_tokens=16, profile=PROFILE)
    heads = SHAPE.layers * SHAPE.kv_heads
    for n in lengths:
        room = floor(Fraction(str(density)) * n * heads)
        used = int(plan.span_rules.span(n).sum())
        step = 1 + n / min(lengths) + n / BETA_ONE  # of one head's span
        assert room - step * heads <= used <= room + 1e-6
    assert plan.solver is not None
    assert (plan.solver.name, plan.solver.status, plan.solver.bound) == (name, "baseline", None)
    assert [cost.length_tokens for cost in plan.lengths] == list(lengths)


def test_dense_baseline_keeps_everything_whatever_the_density() -> None:
    plan = baseline_plan("dense", SHAPE, 0.1, LENGTHS)
    assert [cost.density_ratio for cost in plan.lengths] == [1, 1, 1]


def test_duo_gives_everything_to_the_most_sensitive_heads_and_a_window_to_the_others() -> None:
    plan = baseline_plan("duo", SHAPE, 0.25, (1024,), sink_tokens=8, min_span_tokens=16, profile=PROFILE)
    rules = np.array([[ElasticRule(*rule).is_dense for rule in layer] for layer in plan.rules])
    # 16 heads have 4096 tokens; 3 dense ones leave 1024 to 13, 78 each, and 4 dense ones would leave nothing
    assert rules.sum() == 3
    assert PROFILE.loss[rules].min() > PROFILE.loss[~rules].max()
    assert {rule for layer in plan.rules for rule in layer} == {(0, 1.0), (78, 0.0)}


def test_duo_ranks_heads_by_all_lengths_alike() -> None:
    class OneLengthShouts(KnownLosses):
        def rule_losses(self, rules: tuple[ElasticRule, ...]) -> Float64Array:
            return np.stack([1e6 * self.loss[::-1], self.loss, self.loss])[..., None] * np.ones(len(rules))

    loss = np.zeros((4, 4))
    loss[0, 0], loss[3, 3] = 1.0, 0.9
    assert head_sensitivity(OneLengthShouts(loss), 64).argmax() == 0


def test_pyramid_falls_linearly_to_a_twentieth_of_what_is_not_kept_anyway() -> None:
    shares = [rule.beta for rule in pyramid_rules(5, (4096,), (0.25,), 128)]
    least = 128 / 4096
    last = least + (0.25 - least) / 20
    assert np.allclose(shares, np.linspace(0.5 - last, last, 5), atol=1 / 4096)
    flat = [rule.beta for rule in pyramid_rules(5, (4096,), (0.75,), 128)]
    assert np.allclose(flat, np.linspace(1.0, 0.5, 5), atol=1 / 4096)
    assert [rule.beta for rule in pyramid_rules(1, (4096,), (0.5,), 128)] == [0.5]


def test_baselines_say_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="did you mean 'pyramid'"):
        baseline_plan("piramid", SHAPE, 0.5, LENGTHS)
    with pytest.raises(UsageError, match=r"profile\.safetensors"):
        baseline_plan("duo", SHAPE, 0.5, LENGTHS)
    with pytest.raises(UsageError, match=r"\(0, 1\], got 0"):
        baseline_plan("uniform", SHAPE, 0, LENGTHS)
    for name in ("uniform", "duo", "pyramid"):
        with pytest.raises(InfeasibleError, match="128"):
            baseline_plan(name, SHAPE, 0.2, LENGTHS, profile=PROFILE)


@pytest.mark.parametrize("name", ["uniform", "duo", "pyramid"])
@given(
    lengths=st.lists(st.integers(400, 100_000), min_size=2, max_size=2, unique=True),
    windows=st.tuples(st.integers(100, 300), st.integers(0, 60)),
)
def test_a_baseline_follows_densities_of_its_own_at_two_lengths(
    name: str, lengths: list[int], windows: tuple[int, int]
) -> None:
    """Those of an elastic plan, whose spans are a window and a share of the length."""
    densities = [windows[0] / n + windows[1] / 100 * (1 - windows[0] / n) for n in lengths]
    plan = baseline_plan(
        name, SHAPE, densities, lengths, sink_tokens=8, min_span_tokens=16, profile=PROFILE, length_mode="pinned"
    )
    assert plan.length_mode == "pinned"
    heads = SHAPE.layers * SHAPE.kv_heads
    for n, density in zip(lengths, densities, strict=True):
        room, used = density * n * heads, int(plan.span_rules.span(n).sum())
        least = 0 if name == "pyramid" else room - heads * (3 + n / min(lengths) + n / BETA_ONE)
        assert least <= used <= room + 1e-6  # of a pyramid the top is dense and cannot follow


def test_a_baseline_comes_near_densities_at_more_lengths() -> None:
    lengths, rooms = (1000, 2000, 4000), (500, 700, 1000)
    densities = [room / n for n, room in zip(lengths, rooms, strict=True)]
    plan = baseline_plan("uniform", SHAPE, densities, lengths, min_span_tokens=65)
    spans = [int(plan.span_rules.span(n)[0, 0]) for n in lengths]
    assert all(room * 0.94 <= span <= room for span, room in zip(spans, rooms, strict=True))
    assert spans[0] >= 499 - 34  # not the share that the longest length allows, 250 tokens of 1000


def test_each_length_needs_a_density() -> None:
    with pytest.raises(UsageError, match="2 lengths need as many"):
        baseline_plan("uniform", SHAPE, (0.5,), (1000, 2000))
