"""Evaluation of one method, and the optimizer's candidates as points."""

from __future__ import annotations

import numpy as np
import pytest

from moa.errors import UsageError
from moa.eval.evaluate import evaluate, pareto_points
from moa.eval.perplexity import perplexity
from moa.eval.recall import recall
from moa.eval.records import RecallTask
from moa.hf import apply
from moa.plan import Calibration, ModelShape, Plan
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.sweep import SpanGrid
from moa.spans import ElasticRule

TASK = RecallTask(families=("single", "multikey"), single_texts=1, texts_per_family=1)


def test_dense_and_planned_results_are_what_the_parts_find(model, tokenizer, plan):
    dense = evaluate(model, tokenizer, None, (256,), task=TASK, perplexity_lengths_tokens=(64,))
    assert (dense.method, dense.plan, dense.backend) == ("dense", None, "sdpa")
    assert dense.recall == recall(model, tokenizer, (256,), TASK)
    assert dense.perplexity == perplexity(model, tokenizer, (64,))
    planned = evaluate(model, tokenizer, plan, (256,), method="uniform", density_budget_ratio=0.25, task=TASK)
    assert planned.plan.sha256 == plan.sha256
    assert planned.plan.density_ratio(256) == 0.25
    assert planned.backend == "torch"
    assert not hasattr(model, "moa")
    with apply(model, plan):
        assert planned.recall == recall(model, tokenizer, (256,), TASK)
        assert planned.perplexity == perplexity(model, tokenizer, (256,))


def test_a_plan_is_never_called_dense(model, tokenizer, plan):
    with pytest.raises(UsageError, match="cannot be called 'dense'"):
        evaluate(model, tokenizer, plan, (256,))


def test_points_have_the_predicted_loss_of_every_head():
    shape = ModelShape(architecture="x", layers=2, heads=4, kv_heads=2, head_dim=8)
    calibration = Calibration(
        dataset="synthetic",
        dataset_sha256="",
        samples_per_length=1,
        lengths_tokens=(256, 512),
        seed=0,
        estimator="joint",
        supervision="model",
    )
    grid = SpanGrid((16, 64, 512), (0, 256), 8)
    rng = np.random.default_rng(0)
    lengths = tuple(LengthProfile(n, grid, rng.random((2, 2, 1, 3))) for n in (256, 512))
    profile = Profile(shape, calibration, 8, 16, lengths)
    rules = (((0, 0.125), (0, 1.0)), ((32, 0.0), (0, 0.125)))
    mixed = Plan(model=shape, sink_tokens=8, min_span_tokens=16, rules=rules)
    plans = [Plan.uniform(shape, 0, 0.5, sink_tokens=8, min_span_tokens=16), mixed]
    points = pareto_points(profile, plans, mixed, (0.5, 0.25))
    assert [p.chosen for p in points] == [False, True]
    assert [p.validation_loss for p in points] == [0.5, 0.25]
    for found, at in zip(points[1].losses, lengths, strict=True):
        by_hand = sum(at.rule_loss(ElasticRule(*rules[i][j]), 16)[i, j] for i in range(2) for j in range(2))
        assert (found.length_tokens, found.loss) == (at.n_tokens, pytest.approx(by_hand))
