"""Foreign plans: what a converted plan keeps covers what every query head of the original wants."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import PlanError, UsageError
from moa.model_config import ModelConfig
from moa.plan import ModelShape
from moa.plan_import import ImportOptions, covering_rule, import_plan, union_rule
from moa.spans import BETA_ONE, ElasticRule, span

MOA_ALPHAS = st.sampled_from([-1024.0, 0.0, 1024.0, 2048.0, 8192.0])
MOA_BETAS = st.sampled_from([i / 8 for i in range(9)])
rules_of_group = st.lists(
    st.builds(
        ElasticRule,
        st.one_of(st.sampled_from([-1024, 0, 1024]), st.integers(-2000, 5000)),
        st.one_of(MOA_BETAS, st.floats(min_value=0, max_value=1)),
    ),
    min_size=1,
    max_size=7,
)


def model(layers=2, heads=4, kv_heads=2, max_length_tokens=16384) -> ModelConfig:
    return ModelConfig(
        ModelShape(architecture="x", layers=layers, heads=heads, kv_heads=kv_heads, head_dim=8), max_length_tokens
    )


def spans(rule, n_tokens, floor=128):
    return span(np.int64(rule.alpha), np.int64(rule.beta_fixed), np.asarray(n_tokens, np.int64), floor)


def write_moa(path, alphas, betas):
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return path


@given(rules_of_group, st.one_of(st.integers(1, 6000), st.sampled_from([1, 127, 128, 129, 4096])))
def test_union_covers_every_rule_at_every_length(rules, longest):
    n = np.arange(1, longest + 1)
    united = spans(union_rule(rules, longest), n)
    for rule in rules:
        assert (united >= spans(rule, n)).all()


@given(rules_of_group, st.sampled_from([2**17, 2**20, 2**31]), st.data())
def test_union_covers_long_lengths_too(rules, longest, data):
    n = data.draw(st.integers(1, longest))
    united = union_rule(rules, longest)
    assert all(spans(united, n) >= spans(rule, n) for rule in rules)


@given(rules_of_group, st.integers(1, 6000))
def test_union_is_the_rule_that_covers_the_others_if_there_is_one(rules, longest):
    n = np.arange(1, longest + 1)
    largest = np.max([spans(rule, n) for rule in rules], axis=0)
    dominating = [rule for rule in rules if (spans(rule, n) == largest).all()]
    if dominating:
        # One more token only where two rules differ by less than a token.
        assert (spans(union_rule(rules, longest), n) <= largest + 1).all()
    if len(set(rules)) == 1:
        assert union_rule(rules, longest) == rules[0]


@given(rules_of_group, st.integers(1, 3000), st.integers(-2000, 6000), st.integers(0, BETA_ONE))
def test_no_other_rule_covers_with_less(rules, longest, alpha, beta_fixed):
    n = np.arange(1, longest + 1)
    largest = np.max([spans(rule, n) for rule in rules], axis=0)
    other = spans(ElasticRule(alpha, beta_fixed / BETA_ONE), n)
    if (other >= largest).all():
        # Rounding: one token of alpha, and 1/65536 of beta over at most 3000 tokens, each rounded up to a token.
        assert (spans(union_rule(rules, longest), n) <= other + 2).all()


def test_union_of_a_fixed_window_and_a_share_is_the_chord():
    united = union_rule([ElasticRule(1024, 0.0), ElasticRule(0, 0.5)], 8192)
    assert spans(united, 1024) == 1024
    assert spans(united, 8192) in (4096, 4097)


def test_a_growing_rule_that_dominates_is_used_as_it_is():
    assert union_rule([ElasticRule(0, 0.125), ElasticRule(0, 0.875)], 16384) == ElasticRule(0, 0.875)
    assert union_rule([ElasticRule(0, 1.0), ElasticRule(1024, 0.5)], 16384) == ElasticRule(0, 1.0)


@given(st.floats(-5000, 5000), st.floats(0, 1), st.integers(1, 100_000))
def test_covering_rule_keeps_at_least_what_was_wanted(alpha, beta, n):
    rule = covering_rule(alpha, beta)
    assert rule.alpha + rule.beta * n >= alpha + beta * n - 1e-6
    assert rule.alpha - alpha <= 1
    assert rule.beta - beta <= 1 / BETA_ONE


@given(st.data(), st.sampled_from([(1, 1), (4, 1), (7, 1), (1, 3), (3, 2)]))
def test_converted_plan_covers_every_query_head(tmp_path_factory, data, heads):
    group, kv_heads = heads
    shape = (2, group * kv_heads)
    alphas, betas = ([[data.draw(of) for _ in range(shape[1])] for _ in range(2)] for of in (MOA_ALPHAS, MOA_BETAS))
    path = write_moa(tmp_path_factory.mktemp("moa") / "moa.json", alphas, betas)
    plan = import_plan(path, model(2, shape[1], kv_heads))
    assert (plan.length_mode, plan.sink_tokens, plan.min_span_tokens) == ("pinned", 64, 128)
    n = np.arange(1, 16385, 13)
    kept = np.repeat(plan.span_rules.span(n), group, axis=1)  # [L, HQ, N]
    wanted = np.array(alphas)[..., None] + np.array(betas)[..., None] * n
    assert (kept >= np.minimum(n, np.maximum(128, wanted))).all()
    if group == 1:
        assert plan.rules == tuple(tuple(zip(map(int, a), b, strict=True)) for a, b in zip(alphas, betas, strict=True))


# Layers, query heads, KV heads, mean alpha, mean beta, raw density at 8k and 16k, united density at 8k and 16k; counted
# from the published files.
PUBLISHED = {
    "gradientai--Llama-3-8B-Instruct-262k": (32, 32, 8, -44.0, 0.49719, (0.4918, 0.4945), (0.655, 0.673)),
    "lmsys--vicuna-7b-v1.5-16k": (32, 32, 32, -64.0, 0.5, (0.4922, 0.4961), None),
    "meta-llama--Llama-3.2-1B-Instruct": (16, 32, 8, 322.0, 0.44434, (0.4836, 0.4640), (0.659, 0.633)),
    "lmsys--vicuna-7b-v1.5-16k.streamingllm": (32, 32, 32, 0.0, 0.5, (0.5, 0.5), None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_plan(reference_data, name):
    layers, heads, kv_heads, mean_alpha, mean_beta, raw, united = PUBLISHED[name]
    path = reference_data / "plans" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no published plan at {path}")
    as_mha = import_plan(path, model(layers, heads, heads))
    rules = np.array(as_mha.rules)  # [L, HQ, 2]
    assert rules[..., 0].mean() == pytest.approx(mean_alpha)
    assert rules[..., 1].mean() == pytest.approx(mean_beta, abs=1e-5)
    for n, density in zip((8192, 16384), raw, strict=True):
        assert as_mha.span_rules.density_ratio(n) == pytest.approx(density, abs=2e-4)
    plan = import_plan(path, model(layers, heads, kv_heads))
    for n in (1, 127, 1000, 2048, 8192, 16384):
        wanted = as_mha.span_rules.span(n).reshape(layers, kv_heads, -1).max(axis=-1)  # [L, HKV]
        assert (plan.span_rules.span(n) >= wanted).all()
        # one line above several: at most this much more, where a fixed window meets a growing one
        assert plan.span_rules.density_ratio(n) <= wanted.mean() / n + 0.15
    for n, density in zip((8192, 16384), united or (), strict=False):
        exact = as_mha.span_rules.span(n).reshape(layers, kv_heads, -1).max(axis=-1).mean() / n
        assert exact == pytest.approx(density, abs=1e-3)


GOOD = [[0.0, 1024.0, 0.0, 0.0]] * 2
HALF = [[0.5] * 4] * 2
BAD_MOA = {
    "other keys": ({"rules": []}, r"keys alphas and betas, got \['rules'\]"),
    "a third key": ({"alphas": GOOD, "betas": HALF, "gammas": 1}, "keys alphas and betas"),
    "a list": ([], "keys alphas and betas, got list"),
    "too few layers": (
        {"alphas": GOOD[:1], "betas": HALF},
        "alphas must have one row for each of the model's 2 layers, got 1",
    ),
    "per KV head": ({"alphas": GOOD, "betas": [[0.5] * 2] * 2}, r"betas\[0\] must .* 4 query heads, got 2"),
    "no table": ({"alphas": 3, "betas": HALF}, "alphas must have one row .*got int"),
    "a row of text": ({"alphas": ["abcd", "abcd"], "betas": HALF}, r"alphas\[0\] must .* got str"),
    "text": ({"alphas": GOOD, "betas": [["0.5"] * 4] * 2}, r"betas\[0\]\[0\] must be a number in \[0, 1\], got '0\.5'"),
    "true": ({"alphas": [[True] * 4] * 2, "betas": HALF}, r"alphas\[0\]\[0\] must be a number"),
    "beta above one": ({"alphas": GOOD, "betas": [[1.5] * 4] * 2}, r"betas\[0\]\[0\] .* got 1\.5"),
    "absurd alpha": ({"alphas": [[1e300] * 4] * 2, "betas": HALF}, r"alphas\[0\]\[0\] .* got 1e\+300"),
    "largest alpha": ({"alphas": [[2.0**40] * 4] * 2, "betas": HALF}, r"alphas\[0\]\[0\] must be"),
}


@pytest.mark.parametrize(("content", "message"), BAD_MOA.values(), ids=BAD_MOA.keys())
def test_bad_moa_file_is_refused(tmp_path, content, message):
    path = tmp_path / "moa.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message) as caught:
        import_plan(path, model())
    assert str(caught.value).startswith(str(path))


def test_infinite_alpha_is_refused(tmp_path):
    path = tmp_path / "moa.json"
    path.write_text('{"alphas": [[1e999, 0, 0, 0], [0, 0, 0, 0]], "betas": [[0, 0, 0, 0], [0, 0, 0, 0]]}')
    with pytest.raises(PlanError, match=r"alphas\[0\]\[0\]"):
        import_plan(path, model())


def test_fractional_numbers_are_rounded_up(tmp_path):
    plan = import_plan(write_moa(tmp_path / "m.json", [[0.25, -0.5, 0.25, -0.5]] * 2, [[1e-9] * 4] * 2), model(2, 4, 4))
    assert plan.rules[0][:2] == ((1, 1 / BETA_ONE), (0, 1 / BETA_ONE))


def test_a_longest_length_must_be_known(tmp_path):
    path = write_moa(tmp_path / "m.json", GOOD, HALF)
    with pytest.raises(UsageError, match="--max-length"):
        import_plan(path, model(max_length_tokens=None))
    assert (
        import_plan(path, model(max_length_tokens=None), options=ImportOptions(4096)).lengths[-1].length_tokens == 4096
    )


def write_duo(folder, scores="0.9\t0.1\n0.5\t0.49\n", config=None):
    (folder / "full_attention_heads.tsv").write_text(scores)
    (folder / "config.json").write_text(json.dumps(config or {"sink_size": 128, "recent_size": 256, "lr": 0.02}))
    return folder


def test_duo_pattern(tmp_path):
    folder = write_duo(tmp_path)
    plan = import_plan(folder, model())
    assert plan.rules == (((0, 1.0), (384, 0.0)), ((0, 1.0), (384, 0.0)))
    assert (plan.sink_tokens, plan.min_span_tokens, plan.length_mode) == (128, 384, "running")
    assert plan == import_plan(folder / "full_attention_heads.tsv", model()) == import_plan(folder, model(), "duo")
    dense = import_plan(folder, model(), options=ImportOptions(threshold=0.0))
    assert dense.span_rules.density_ratio(8192) == 1


def test_duo_window_for_deployment_wins(tmp_path):
    config = {"sink_size": 128, "recent_size": 256, "deploy_sink_size": 64, "deploy_recent_size": None}
    plan = import_plan(write_duo(tmp_path, config=config), model())
    assert (plan.sink_tokens, plan.min_span_tokens) == (64, 320)


@pytest.mark.parametrize(
    ("scores", "config", "message"),
    [
        ("0.9\t0.1\n", None, "scores must have one row for each of the model's 2 layers, got 1"),
        ("0.9\n0.1\n", None, r"scores\[0\] must .* 2 KV heads, got 1"),
        ("0.9\tx\n0.1\t0\n", None, "table of numbers with tabs between"),
        ("nan\t1\n0.1\t0\n", None, "not a finite number"),
        ("1\t1\n0\t0\n", {"sink_size": 1}, "recent_size must be a whole number of tokens from 1 on, got None"),
        ("1\t1\n0\t0\n", {"sink_size": -1, "recent_size": 2}, "sink_size must be .* got -1"),
        ("1\t1\n0\t0\n", {"sink_size": 1, "recent_size": True}, "recent_size must be"),
    ],
)
def test_bad_duo_pattern_is_refused(tmp_path, scores, config, message):
    with pytest.raises(PlanError, match=message):
        import_plan(write_duo(tmp_path, scores, config), model())


def test_binary_duo_pattern_is_refused(tmp_path):
    write_duo(tmp_path)
    (tmp_path / "full_attention_heads.tsv").write_bytes(b"\x80\x04\xff")
    with pytest.raises(PlanError, match="table of numbers"):
        import_plan(tmp_path, model())
