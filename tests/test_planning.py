"""From a profile to plans under every search: what was asked for holds in each plan, is recorded, and gains nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import MoaError, UsageError
from moa.eval.front import BUDGETS, budget_front, predicted_losses
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import Target
from moa.optimize.solve import solve
from moa.plan import Calibration, ModelShape
from moa.planning import assignment_problem, candidates, make_plan
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.sweep import SpanGrid
from moa.settings import CompressSettings
from moa.spans import DENSE, ElasticRule
from moa.stages import Workspace

SETTINGS = CompressSettings(density=0.4, lengths_tokens=(128, 256), sink_tokens=8, min_span_tokens=16)
SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=3, heads=8, kv_heads=4, head_dim=8)
SEARCHES = [{"elastic": e, "per_layer": p} for e, p in product((True, False), repeat=2)]


def made_up_profile(seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    lengths = []
    for n in SETTINGS.lengths_tokens:
        grid = SpanGrid.for_length(n, 8, 16, 4)
        share = np.array(grid.spans_tokens) / n
        loss = rng.lognormal(0, 2, (3, 4, 4, 1)) * (1 - share) ** rng.uniform(1, 4, (3, 4, 1, 1))
        lengths.append(LengthProfile(n, grid, loss))
    calibration = Calibration(
        dataset="made up", dataset_sha256="0", samples_per_length=2, lengths_tokens=(128, 256), seed=0, estimator="joint",
        supervision="model",
    )  # fmt: skip
    return Profile(SHAPE, calibration, 8, 16, tuple(lengths))


@pytest.mark.parametrize("search", SEARCHES)
def test_every_plan_is_such_as_was_asked_for(search: dict[str, bool]) -> None:
    profile, asked = made_up_profile(), replace(SETTINGS, **search)
    plans = candidates(*assignment_problem(profile, asked), profile, asked)
    assert plans
    for plan in plans:
        assert plan.objective is not None
        assert (plan.objective.elastic, plan.objective.per_layer) == (asked.elastic, asked.per_layer)
        assert asked.elastic or all(beta == 0 for layer in plan.rules for _, beta in layer)
        assert not asked.per_layer or all(len(set(layer)) == 1 for layer in plan.rules)
        for n in asked.budget_lengths:
            assert plan.span_rules.density_ratio(n) <= asked.density


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.4, 0.7]))
@settings(max_examples=4)
def test_a_narrower_search_never_finds_less_loss(seed: int, density: float) -> None:
    profile, best = made_up_profile(seed), {}
    _, whole = assignment_problem(profile, replace(SETTINGS, density=density))
    weights = Target.balanced(whole).weights
    target = Target(weights, np.full(len(weights), np.inf))
    with MilpWorker() as worker:
        for search in SEARCHES:
            asked = replace(SETTINGS, density=density, max_rules_per_layer=99, **search)
            rules, problem = assignment_problem(profile, asked)
            found = solve(problem, target, rel_gap=0.0, worker=worker)
            plan = make_plan(found, rules, problem, profile, asked)
            best[asked.elastic, asked.per_layer] = float(weights @ predicted_losses(profile, plan, asked.unseen_tokens))
    slack = 1 + 1e-6
    assert best[True, True] <= best[False, True] * slack
    assert best[True, False] <= best[True, True] * slack
    assert best[True, False] <= best[False, False] * slack
    assert best[False, False] <= best[False, True] * slack


@pytest.mark.parametrize(
    ("search", "message"), [({"elastic": False}, "no-elastic"), ({"per_layer": True}, "per-layer")]
)
def test_a_plan_that_breaks_the_search_is_never_made(search: dict[str, bool], message: str) -> None:
    """The optimizer's answer to a wider problem stands for its being wrong."""
    profile = made_up_profile()
    rules, problem = assignment_problem(profile, SETTINGS)
    with MilpWorker() as worker:
        found = solve(problem, worker=worker)
    make_plan(found, rules, problem, profile, SETTINGS)
    with pytest.raises(MoaError, match=message):
        make_plan(found, rules, problem, profile, replace(SETTINGS, **search))


def test_a_front_is_searched_as_narrowly(tmp_path) -> None:
    profile, asked = made_up_profile(), replace(SETTINGS, elastic=False, per_layer=True)
    points = [p for p in budget_front(profile, asked, (), Workspace(tmp_path)) if p.sweep == BUDGETS]
    assert len(points) > 5
    for point in points:
        assert all(len(set(layer)) == 1 and layer[0][1] == 0 for layer in point.plan.rules)


def test_growing_rules_of_a_file_are_refused_without_elasticity() -> None:
    fixed, share = ElasticRule(32, 0.0), ElasticRule(0, 0.25)
    assert replace(SETTINGS, rules=(fixed,), elastic=False).rules == (fixed,)
    with pytest.raises(UsageError, match=r"has 2 others, such as \[0, 0\.25\]"):
        replace(SETTINGS, rules=(fixed, share, DENSE), elastic=False)
