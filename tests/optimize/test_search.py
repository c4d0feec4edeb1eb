"""Narrower searches: one rule per layer, and no elasticity. Both bind every method, and can only cost, never gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import InfeasibleError, MoaError
from moa.optimize import solve as solve_module
from moa.optimize.greedy import greedy
from moa.optimize.instance import make_instance
from moa.optimize.lagrangian import relax
from moa.optimize.milp import MilpAnswer, MilpWorker
from moa.optimize.pareto import pareto_front
from moa.optimize.problem import AssignmentProblem, Target, by_layer, check, fits_budgets
from moa.optimize.solve import solve

MakeProblem = Callable[..., AssignmentProblem]
Enumerate = Callable[[AssignmentProblem, Target], float | None]

seeds = st.integers(0, 2**32 - 1)
limits = st.sampled_from([None, 1, 2, 3])
sizes = st.sampled_from([(1, 1, 3), (2, 2, 4), (1, 4, 5), (4, 1, 3), (3, 2, 4), (2, 3, 3)])


@given(seeds, limits, sizes, st.integers(1, 3))
@settings(max_examples=60)
def test_one_rule_per_layer_agrees_with_enumeration(
    worker: MilpWorker,
    make_tiny: MakeProblem,
    best_by_enumeration: Enumerate,
    seed: int,
    limit: int | None,
    size: tuple[int, int, int],
    lengths: int,
) -> None:
    free = make_tiny(seed, limit, lengths, *size)
    problem = replace(free, per_layer=True)
    for target in (Target.balanced(problem), Target.at_length(problem, lengths - 1)):
        answer, exact = solve(problem, target, rel_gap=0.0, worker=worker), best_by_enumeration(problem, target)
        assert exact is not None
        tolerance = 1e-7 * float(target.weights @ np.abs(problem.loss).sum(axis=(1, 2, 3)))
        assert answer.rules.shape == problem.loss.shape[1:3]
        assert (answer.rules == answer.rules[:, :1]).all()
        assert fits_budgets(problem, answer.rules)
        assert abs(answer.value - exact) <= tolerance
        assert answer.bound <= exact + tolerance
        assert solve(free, target, rel_gap=0.0, worker=worker).value <= answer.value + tolerance


@given(seeds, sizes, st.integers(1, 3))
@settings(max_examples=60)
def test_bound_is_below_and_greedy_above_the_best_of_layers(
    make_tiny: MakeProblem, best_by_enumeration: Enumerate, seed: int, size: tuple[int, int, int], lengths: int
) -> None:
    problem = replace(make_tiny(seed, None, lengths, *size), per_layer=True)
    target = Target.balanced(problem)
    exact, instance = best_by_enumeration(problem, target), make_instance(by_layer(problem), target)
    assert exact is not None
    optimum = (exact - instance.offset) / instance.scale
    assert relax(instance).bound <= optimum + 1e-7
    picks = greedy(instance)
    assert picks is not None
    assert fits_budgets(problem, np.repeat(picks, size[1], axis=1))
    assert instance.cost_of(picks) >= optimum - 1e-7


@given(seeds, sizes, st.sampled_from([0.1, 0.33, 0.3, 0.77]))
def test_layers_as_heads_have_the_same_room(
    make_tiny: MakeProblem, seed: int, size: tuple[int, int, int], density: float
) -> None:
    """Whatever a layer's rules are: the budgets of the smaller problem are kept just where those of the whole are."""
    free = make_tiny(seed, None, 1, *size)
    problem = replace(free, density_budget=(density,), per_layer=True)
    picks = np.random.default_rng(seed).integers(0, size[2], (size[0], 1))
    whole = np.repeat(picks, size[1], axis=1)
    assert fits_budgets(by_layer(problem), picks) == fits_budgets(problem, whole)
    assert np.allclose(by_layer(problem).losses(picks), problem.losses(whole))


@pytest.mark.parametrize("always_milp", [True, False])
def test_every_method_keeps_layers_together_when_the_solver_fails(
    make_realistic: MakeProblem, worker: MilpWorker, monkeypatch: pytest.MonkeyPatch, always_milp: bool
) -> None:
    problem = replace(make_realistic(3, 6, 4, 0.25, limit=2), per_layer=True)
    whole = solve(problem, worker=worker)
    monkeypatch.setattr(solve_module, "solve_milp", lambda *_, **__: MilpAnswer("failed: planted", None, -np.inf))
    answer = solve(problem, worker=worker, always_milp=always_milp)
    assert answer.solver in ("lagrangian", "greedy")
    assert (answer.rules == answer.rules[:, :1]).all()
    assert answer.bound <= whole.value <= answer.value * (1 + 1e-9)


def test_the_front_keeps_layers_together(make_realistic: MakeProblem, worker: MilpWorker) -> None:
    problem = replace(make_realistic(4, 5, 4, 0.3), per_layer=True)
    front = pareto_front(problem, levels=1, worker=worker)
    assert len(front) > 1
    for found in front:
        assert (found.rules == found.rules[:, :1]).all()
        check(problem, found)


def test_check_catches_a_layer_of_two_rules(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    problem = replace(make_tiny(5, limit=None), per_layer=True)
    good = solve(problem, worker=worker)
    mixed = good.rules.copy()
    mixed[0] = [0, 1] if good.rules[0, 0] == 0 else [0, good.rules[0, 0]]
    lie = replace(good, rules=mixed, losses=problem.losses(mixed))
    assert not fits_budgets(problem, mixed)
    with pytest.raises(MoaError, match="optimizer's answer is wrong"):
        check(problem, lie)


def test_what_no_layer_can_keep_is_named(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    problem = make_tiny(6, lengths=1)
    spans = np.full_like(problem.spans, 900)
    problem = replace(problem, spans=spans, density_budget=(0.5,), per_layer=True)
    with pytest.raises(InfeasibleError, match=r"density budget 0\.5 at 1000 tokens"):
        solve(problem, worker=worker)
