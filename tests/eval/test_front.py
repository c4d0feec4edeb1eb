"""The front over budgets: more memory never predicts more loss, every plan keeps its budget, files say what they hold."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moa.eval.front import (
    BUDGETS,
    LENGTHS,
    FrontPoint,
    better_for_more,
    budget_front,
    front_densities,
    predicted_losses,
    write_front,
)
from moa.plan import Calibration, ModelShape, Plan, load_plan
from moa.planning import assignment_problem
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.sweep import SpanGrid
from moa.settings import CompressSettings
from moa.stages import Workspace

SETTINGS = CompressSettings(density=0.4, lengths_tokens=(128, 256), sink_tokens=8, min_span_tokens=16)
SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=3, heads=8, kv_heads=4, head_dim=8)


def made_up_profile() -> Profile:
    rng = np.random.default_rng(0)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("front")


@pytest.fixture(scope="module")
def points(folder: Path) -> tuple[FrontPoint, ...]:
    candidates = (Plan.uniform(SHAPE, 0, 0.25, sink_tokens=8, min_span_tokens=16),)
    candidates = tuple(
        Plan.model_validate(
            {**dict(c), "sha256": "", "lengths": tuple(c.at_length(n) for n in SETTINGS.budget_lengths)}
        )
        for c in candidates
    )
    return budget_front(made_up_profile(), SETTINGS, candidates, Workspace(folder))


def test_more_memory_predicts_less_loss_and_every_budget_is_kept(points: tuple[FrontPoint, ...]) -> None:
    front = [p for p in points if p.sweep == BUDGETS]
    assert len(front) >= 10
    assert [p.density_budget_ratio for p in front] == sorted({p.density_budget_ratio for p in front})
    assert all(a.value > b.value for a, b in pairwise(front))
    for point in points:
        assert all(at.density_ratio <= point.density_budget_ratio for at in point.plan.lengths)
    assert 0.4 in [p.density_budget_ratio for p in front]
    assert {p.sweep for p in points} == {BUDGETS, LENGTHS, "uniform", "duo", "pyramid", "dense"}


def test_no_baseline_is_predicted_better_than_the_optimum_beyond_its_grid(points: tuple[FrontPoint, ...]) -> None:
    best = {p.density_budget_ratio: p.value for p in points if p.sweep == BUDGETS}
    for point in points:
        if point.sweep in ("uniform", "pyramid") and point.density_budget_ratio in best:
            assert best[point.density_budget_ratio] <= point.value * 1.05
    assert next(p for p in points if p.sweep == "dense").value == 0


def test_losses_are_the_optimizer_s_own(points: tuple[FrontPoint, ...]) -> None:
    profile = made_up_profile()
    rules, problem = assignment_problem(profile, SETTINGS)
    index = {(rule.alpha, rule.beta): i for i, rule in enumerate(rules)}
    for point in points:
        if point.sweep == BUDGETS:
            picks = np.array([[index[rule] for rule in layer] for layer in point.plan.rules])
            assert np.allclose(point.losses, problem.losses(picks))
    dense = next(p for p in points if p.sweep == "dense").plan
    assert predicted_losses(profile, dense, SETTINGS.unseen_tokens).tolist() == [0, 0, 0]


def test_a_second_run_reads_the_solved_plans(points: tuple[FrontPoint, ...], folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("moa.eval.front.solve", None)
    again = budget_front(made_up_profile(), SETTINGS, (), Workspace(folder))
    assert [p.plan for p in again if p.sweep == BUDGETS] == [p.plan for p in points if p.sweep == BUDGETS]


def test_plans_name_the_texts_they_came_from(points: tuple[FrontPoint, ...], folder: Path) -> None:
    profile = made_up_profile()
    other = replace(profile, calibration=profile.calibration.model_copy(update={"seed": 1}))
    again = budget_front(other, SETTINGS, (), Workspace(folder))
    assert {p.plan.calibration.seed for p in again if p.sweep == BUDGETS} == {1}


def test_files_name_every_plan_of_the_optimizer(points: tuple[FrontPoint, ...], tmp_path: Path) -> None:
    (tmp_path / "front").mkdir()
    (tmp_path / "front/plan-999.json").write_text("of an earlier front")
    chosen = next(p.plan for p in points if p.sweep == LENGTHS)
    write_front(points, tmp_path, chosen)
    rows = list(csv.DictReader((tmp_path / "front/front.csv").read_text().splitlines()))
    assert len(rows) == len(points)
    assert {p.name for p in tmp_path.glob("front/plan-*.json")} == {row["plan"] for row in rows if row["plan"]}
    for row, point in zip(rows, points, strict=True):
        assert bool(row["plan"]) == (point.sweep in (BUDGETS, LENGTHS))
        if row["plan"]:
            assert load_plan(tmp_path / "front" / row["plan"]) == point.plan
        assert float(row["density_ratio_at_512"]) == pytest.approx(point.plan.lengths[2].density_ratio, rel=1e-5)
        assert float(row["predicted_loss_at_256"]) == pytest.approx(point.losses[1], rel=1e-5, abs=1e-12)
    assert (tmp_path / "front/front.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_that_costs_more_and_predicts_no_less_is_left_out(points: tuple[FrontPoint, ...]) -> None:
    first, second, third = (p for p in points[:3])
    worse = replace(second, value=first.value)
    assert better_for_more([first, worse, third]) == [first, third]


def test_densities_span_from_the_least_possible_to_nearly_dense() -> None:
    found = front_densities(SETTINGS)
    assert (found[0], found[-1]) == (round(1.05 * 16 / 128, 4), 0.9)
    assert 0.4 in found
    assert len(found) == 13
    replace(SETTINGS, density=found[0])


def test_no_density_of_very_long_texts_is_below_the_least_possible() -> None:
    settings = CompressSettings(lengths_tokens=(200_000, 400_000), sink_tokens=8, min_span_tokens=64)
    assert min(front_densities(settings)) > 64 / 200_000
