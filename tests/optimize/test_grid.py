"""The candidate grid: scale-aware, distinct, sorted, always with the dense rule and short windows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import UsageError
from moa.optimize.grid import moa_grid, rule_grid, span_table
from moa.spans import DENSE, ElasticRule

lengths = st.lists(st.integers(512, 131072), min_size=1, max_size=4)


@given(lengths, st.sampled_from([(64, 128), (0, 1), (4, 37), (64, 512)]))
def test_grid_is_distinct_sorted_and_complete(lengths: list[int], sizes: tuple[int, int]) -> None:
    sink, least = sizes
    rules = rule_grid(lengths, sink, least)
    probes = [*sorted(set(lengths), reverse=True), 2 * max(lengths)]
    spans = span_table(rules, probes, least)
    assert 2 <= len(rules) <= 120
    assert len({tuple(column) for column in spans.T.tolist()}) == len(rules)
    assert (np.diff(spans[0]) >= 0).all()
    assert rules[-1] == DENSE
    assert spans[0, 0] == min(least, max(lengths))


@pytest.mark.parametrize("lengths", [[512, 1024], [4096, 8192, 16384], [8192, 32768, 131072], [512, 131072]])
def test_grid_has_40_to_120_rules_of_every_kind(lengths: list[int]) -> None:
    rules = rule_grid(lengths, 64, 128)
    assert 40 <= len(rules) <= 120
    assert ElasticRule(128, 0.0) in rules
    assert ElasticRule(0, 1 / 2) in rules
    assert any(rule.alpha < 0 for rule in rules)
    assert any(rule.alpha > 0 and rule.beta > 0 for rule in rules)


def test_moa_s_grid_is_the_published_one_at_its_lengths() -> None:
    """Counted in its released code's output: 48 pairs, so many betas for every alpha."""
    counts = {-1024: 4, 0: 8, 1024: 8, 2048: 7, 3072: 6, 4096: 5, 5120: 4, 6144: 3, 7168: 2, 8192: 1}
    assert Counter(rule.alpha for rule in moa_grid(2048, 8192)) == counts


def test_grid_has_moa_s_spans_and_finer_small_windows() -> None:
    lengths, unseen = (2048, 4096, 8192), 16384
    rules = rule_grid(lengths, 32, 64, extrapolation_tokens=unseen)
    spans = {tuple(column) for column in span_table(rules, (*lengths, unseen), 64).T.tolist()}
    assert {tuple(c) for c in span_table(moa_grid(2048, 8192), (*lengths, unseen), 64).T.tolist()} <= spans
    windows = [rule.alpha for rule in rules if rule.beta == 0 and rule.alpha <= 1024]
    assert windows == [64, 76, 91, 108, 128, 152, 181, 215, 256, 304, 362, 431, 512, 609, 724, 861, 1024]
    assert {rule.beta for rule in rules if rule.alpha == 0} >= {1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16}


@given(lengths, st.sampled_from([(64, 128), (0, 1), (4, 37)]))
def test_without_elasticity_the_grid_s_fixed_windows_are_left(lengths: list[int], sizes: tuple[int, int]) -> None:
    every, fixed = rule_grid(lengths, *sizes), rule_grid(lengths, *sizes, elastic=False)
    assert fixed == tuple(rule for rule in every if rule.beta == 0)
    spans = span_table(fixed, [max(lengths)], sizes[1])[0]
    assert (spans[0], spans[-1]) == (min(sizes[1], max(lengths)), max(lengths))


def test_grid_ignores_the_order_of_lengths() -> None:
    assert rule_grid([8192, 2048], 64, 128) == rule_grid([2048, 8192, 2048], 64, 128)


def test_grid_can_be_thinned_but_keeps_the_plain_rules() -> None:
    rules = rule_grid([8192, 32768], 64, 128, max_rules=40)
    assert len(rules) <= 40
    assert DENSE in rules
    assert ElasticRule(0, 1 / 8) in rules


@pytest.mark.parametrize(("lengths", "sink", "least"), [([], 0, 1), ([0], 0, 1), ([512], 64, 64), ([512], -1, 8)])
def test_grid_refuses_what_cannot_be_meant(lengths: list[int], sink: int, least: int) -> None:
    with pytest.raises(UsageError):
        rule_grid(lengths, sink, least)
