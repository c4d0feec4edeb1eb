"""The greedy search by measured loss."""

from __future__ import annotations

import numpy as np
import pytest

from moa.errors import InfeasibleError
from moa.eval import oracle
from moa.eval.oracle import oracle_plans
from moa.hf.shape import model_shape
from moa.plan import Plan
from moa.spans import DENSE

N, LEAST = 256, 16


def spans_of(plan: Plan) -> list[list[int]]:
    return plan.span_rules.span(N).tolist()


def test_it_shortens_what_costs_least_and_keeps_budgets(model, monkeypatch):
    """Heads cost what they cost on paper: head (1, 1) much, (0, 0) ever more, the others nothing."""
    shape = model_shape(model, "tiny")

    def loss(model, texts, plan):
        (a, _), (_, d) = spans_of(plan)
        assert plan.sink_tokens == 8
        return np.array([10 * (N - d) / N + ((N - a) / N) ** 2])

    monkeypatch.setattr(oracle, "text_losses", loss)
    plans = oracle_plans(model, shape, [], N, (0.5, 0.8), 8, LEAST)
    assert list(plans) == [0.8, 0.5]
    for density, plan in plans.items():
        assert plan.span_rules.density_ratio(N) <= density
    (a, b), (c, d) = spans_of(plans[0.5])
    assert d == N
    assert a == N // 2
    assert b == c == LEAST
    assert plans[0.5].rules[1][1] == (DENSE.alpha, DENSE.beta)


def test_the_order_follows_the_model_as_it_is_by_then(model, monkeypatch):
    """(0, 0) is free until (0, 1) is short: a search that trusted its first measurements would shorten both."""
    shape = model_shape(model, "tiny")

    def loss(model, texts, plan):
        (a, b), (c, d) = spans_of(plan)
        return np.array([100.0 * (a < N and b < N) + 0.1 * (N - c) / N + 0.1 * (N - d) / N])

    monkeypatch.setattr(oracle, "text_losses", loss)
    (a, b), _ = spans_of(oracle_plans(model, shape, [], N, (0.6,), 8, LEAST)[0.6])
    assert max(a, b) == N


def test_a_real_model_is_searched(model, tokenizer):
    from moa.profile.synthetic import synthetic_samples

    plans = oracle_plans(model, model_shape(model, "tiny"), synthetic_samples(tokenizer, N, 2, 0), N, (0.25,), 8, LEAST)
    assert 0.06 < plans[0.25].span_rules.density_ratio(N) <= 0.25
    assert min(map(min, spans_of(plans[0.25]))) >= LEAST


def test_spans_that_cannot_be_that_short_are_infeasible(model):
    with pytest.raises(InfeasibleError, match=r"density 0\.05"):
        oracle_plans(model, model_shape(model, "tiny"), [], N, (0.05,), 8, LEAST)
