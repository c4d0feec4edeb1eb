"""Every statement of the definition of spans, against exact fractions and brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.spans import BETA_ONE, DENSE, MAX_TOKENS, ElasticRule, SpanRules, keep, span

betas = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.125, 1 / BETA_ONE, 1 - 1 / BETA_ONE]), st.floats(min_value=0, max_value=1)
)
elastic_rules = st.builds(ElasticRule, st.integers(-10_000, 10_000), betas)
lengths = st.one_of(st.integers(1, 5000), st.sampled_from([1, 63, 64, 65, 127, 128, 129, 2**31 - 1, 2**31, 2**31 + 1]))


@st.composite
def floors(draw):
    """(sink_tokens, min_span_tokens)"""
    sink = draw(st.integers(0, 130))
    return sink, draw(st.integers(sink + 1, 300))


@st.composite
def span_rules(draw, length_mode="running"):
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rules = [[draw(elastic_rules) for _ in range(heads)] for _ in range(layers)]
    return make_rules(rules, *draw(floors()), length_mode)


def make_rules(rules, sink, floor, length_mode="running"):
    alpha = np.array([[rule.alpha for rule in layer] for layer in rules], dtype=np.int64)
    beta_fixed = np.array([[rule.beta_fixed for rule in layer] for layer in rules], dtype=np.int64)
    return SpanRules(alpha, beta_fixed, sink, floor, length_mode)


def exact_span(rule: ElasticRule, n: int, floor: int) -> int:
    return min(n, max(floor, math.ceil(rule.alpha + Fraction(rule.beta) * n)))


@given(elastic_rules, lengths, st.integers(1, 300))
def test_span_is_the_definition_in_fractions(rule, n, floor):
    kept = span(np.int64(rule.alpha), np.int64(rule.beta_fixed), np.int64(n), floor)
    assert int(kept) == exact_span(rule, n, floor)


@given(st.integers(-MAX_TOKENS + 1, MAX_TOKENS - 1), betas, st.integers(1, MAX_TOKENS - 1))
def test_span_is_exact_up_to_the_largest_numbers(alpha, beta, n):
    rule = ElasticRule(alpha, beta)
    kept = span(np.int64(rule.alpha), np.int64(rule.beta_fixed), np.int64(n), 128)
    assert int(kept) == exact_span(rule, n, 128)


@given(span_rules(), lengths)
def test_span_of_a_number_and_of_an_array_agree(rules, n):
    many = rules.span(np.array([[n, n + 1]]))  # [L, HKV, 1, 2]
    assert many.dtype == np.int64
    assert many.shape == (*rules.alpha.shape, 1, 2)
    assert (many[..., 0, 0] == rules.span(n)).all()
    assert (many[..., 0, 1] == rules.span(n + 1)).all()


@given(elastic_rules, lengths, st.integers(1, 300))
def test_span_grows_by_at_most_one_token_per_token(rule, n, floor):
    before, after = exact_span(rule, n, floor), exact_span(rule, n + 1, floor)
    assert before <= after <= before + 1


@given(span_rules(), lengths)
def test_running_window_never_moves_back(rules, n):
    starts = rules.window_start(np.array([n - 1, n, n + 1]))
    assert (np.diff(starts, axis=-1) >= 0).all()


@given(span_rules(), lengths)
def test_span_is_at_least_the_floor_and_at_most_the_text(rules, n):
    kept = rules.span(n)
    assert (kept <= n).all()
    assert (kept >= min(n, rules.min_span_tokens)).all()


@given(span_rules(), lengths)
def test_density_lies_between_the_floor_and_one(rules, n):
    density = rules.density_ratio(n)
    assert min(n, rules.min_span_tokens) / n - 1e-12 <= density <= 1


@given(st.integers(0, 5000), lengths, floors())
def test_dense_rule_keeps_everything(alpha, n, floor):
    rules = make_rules([[ElasticRule(alpha, 1.0), DENSE]], *floor)
    assert (rules.span(n) == n).all()
    assert rules.density_ratio(n) == 1
    assert (rules.window_start(n - 1) == rules.sink_tokens).all()


@given(elastic_rules, floors())
def test_dense_is_said_only_of_rules_that_keep_everything(rule, floor):
    kept = [exact_span(rule, n, floor[1]) == n for n in (1, 1000, 10**6, 2**39)]
    assert rule.is_dense == all(kept)


@given(span_rules(), st.integers(0, 600))
def test_running_keep_is_the_last_span_tokens_and_the_sinks(rules, position):
    start = rules.window_start(position)[0, 0]
    kept = [key for key in range(position + 5) if keep(position, key, start, rules.sink_tokens)]
    size = exact_span(
        ElasticRule(int(rules.alpha[0, 0]), rules.beta_fixed[0, 0] / BETA_ONE), position + 1, rules.min_span_tokens
    )
    sinks = range(min(rules.sink_tokens, position + 1))
    window = range(position + 1 - (size - len(sinks)), position + 1)
    assert kept == sorted({*sinks, *window})
    assert len(kept) == size, "what a query keeps is what memory is counted for"


@given(span_rules("pinned"), st.integers(1, 600), st.data())
def test_pinned_window_has_one_width_for_all_queries(rules, n, data):
    position = data.draw(st.integers(0, n - 1))
    width = rules.span(n) - rules.sink_tokens
    expected = np.maximum(position + 1 - width, rules.sink_tokens)
    assert (rules.window_start(position, pinned_tokens=n) == expected).all()


@given(span_rules("pinned"), st.integers(1, 100), st.integers(0, 200))
def test_a_query_beyond_its_pinned_length_keeps_itself(rules, n, beyond):
    position = max(n, rules.sink_tokens) + beyond
    assert (rules.window_start(position, pinned_tokens=n) <= position).all()


@given(span_rules(), st.integers(1, 3000))
def test_running_and_pinned_agree_on_the_last_query(rules, n):
    pinned = SpanRules(rules.alpha, rules.beta_fixed, rules.sink_tokens, rules.min_span_tokens, "pinned")
    assert (rules.window_start(n - 1) == pinned.window_start(n - 1, pinned_tokens=n)).all()
    assert rules.kv_bytes(n, 64, 2) == pinned.kv_bytes(n, 64, 2)


@given(span_rules(), st.integers(1, 1500))
def test_a_key_that_was_dropped_is_never_needed_again(rules, n):
    starts = rules.window_start(np.arange(n))  # [L, HKV, N]
    for key in range(rules.sink_tokens, n, 97):
        seen = starts[0, 0, key:] <= key
        assert not (np.diff(seen.astype(int)) > 0).any()


def test_every_query_keeps_itself():
    rules = make_rules([[ElasticRule(-10_000, 0.0)]], 64, 65)
    positions = np.arange(2000)
    assert (rules.window_start(positions)[0, 0, 64:] == positions[64:]).all()


@given(span_rules(), lengths, st.integers(1, 128), st.sampled_from([2, 4, 8]))
def test_kv_bytes_counts_keys_and_values_of_the_kept_tokens(rules, n, head_dim, element_bytes):
    assert rules.kv_bytes(n, head_dim, element_bytes) == int(rules.span(n).sum()) * 2 * head_dim * element_bytes


@given(st.floats(min_value=0, max_value=1))
def test_beta_is_rounded_once(beta):
    rule = ElasticRule(0, beta)
    assert abs(rule.beta - beta) <= 0.5 / BETA_ONE
    assert ElasticRule(0, rule.beta) == rule
    assert Fraction(rule.beta) * BETA_ONE == rule.beta_fixed


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.5, True, MAX_TOKENS, -MAX_TOKENS])
def test_alpha_must_be_a_whole_number(alpha):
    with pytest.raises(ValueError, match="alpha must be a whole number"):
        ElasticRule(alpha, 0.5)


@pytest.mark.parametrize("beta", [float("nan"), -0.01, 1.01, float("inf"), True])
def test_beta_must_be_a_share(beta):
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
        ElasticRule(0, beta)


@pytest.mark.parametrize(("sink", "floor"), [(64, 64), (64, 1), (-1, 5), (0, 0)])
def test_floor_must_exceed_the_sinks(sink, floor):
    with pytest.raises(ValueError, match="must exceed sink_tokens"):
        make_rules([[DENSE]], sink, floor)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape \[L, HKV\]"):
        SpanRules(np.zeros((1, 2), np.int64), np.zeros((2, 1), np.int64), 64, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": np.zeros((1, 1))}, "alpha must be int64 .*, got float64"),
        ({"alpha": np.full((1, 1), MAX_TOKENS)}, "alpha must be int64 from"),
        ({"beta_fixed": np.full((1, 1), -1)}, "beta_fixed must be int64 from 0 to 65536, got int64"),
        ({"beta_fixed": np.full((1, 1), BETA_ONE + 1)}, "beta_fixed must be int64 from 0 to 65536"),
        ({"beta_fixed": np.zeros((1, 1), np.int32)}, "beta_fixed must be int64 .*, got int32"),
        ({"length_mode": "walking"}, "length_mode must be 'running' or 'pinned', got 'walking'"),
        ({"alpha": np.zeros(1, np.int64), "beta_fixed": np.zeros(1, np.int64)}, r"one shape \[L, HKV\]"),
    ],
)
def test_rules_that_cannot_be_are_refused(change, message):
    good = {"alpha": np.zeros((1, 1), np.int64), "beta_fixed": np.zeros((1, 1), np.int64)}
    SpanRules(**good, sink_tokens=4, min_span_tokens=8)
    with pytest.raises(ValueError, match=message):
        SpanRules(**good | change, sink_tokens=4, min_span_tokens=8)


def test_pinned_needs_a_length():
    with pytest.raises(ValueError, match="pinned_tokens"):
        make_rules([[DENSE]], 64, 128, "pinned").window_start(3)


def test_density_needs_a_text():
    with pytest.raises(ValueError, match="at least 1 token"):
        make_rules([[DENSE]], 64, 128).density_ratio(0)


def test_torch_computes_the_same_spans():
    torch = pytest.importorskip("torch")
    rule, n = ElasticRule(-1024, 0.3), torch.arange(1, 5000)
    ours = span(np.int64(rule.alpha), np.int64(rule.beta_fixed), n.numpy(), 128)
    wanted = rule.alpha - ((-rule.beta_fixed * n) >> 16)  # arithmetic shift, as in the kernels
    assert torch.equal(torch.minimum(n, wanted.clamp(min=128)), torch.from_numpy(ours))
