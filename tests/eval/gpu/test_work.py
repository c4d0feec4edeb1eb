"""What a case costs at least, counted once more with a mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.eval.gpu import patterns, work
from moa.eval.gpu.cases import Case, Part, tiers
from moa.eval.gpu.heads import HEADS, LLAMA_8B, HeadShape
from moa.eval.gpu.patterns import Pattern
from moa.spans import ElasticRule, keep

RULES = st.tuples(st.integers(-300, 300), st.sampled_from([0.0, 0.125, 0.5, 1.0])).map(lambda r: ElasticRule(*r))
HEADS_2 = HeadShape("two", 6, 2, 16)


@st.composite
def a_pattern(draw: st.DrawFn) -> Pattern:
    mode = draw(st.sampled_from(["running", "pinned"]))
    layers = draw(st.lists(st.tuples(RULES, RULES), min_size=1, max_size=2))
    return Pattern("drawn", patterns.span_rules(layers, mode))


def seen(pattern: Pattern, layer: int, head: int, position: int, length: int) -> list[int]:
    start = int(pattern.rules.window_start(position, length)[layer, head])
    return [j for j in range(position + 1) if keep(position, j, start, pattern.rules.sink_tokens)]


@given(a_pattern(), st.integers(0, 400), st.integers(1, 40), st.integers(1, 3))
def test_pairs_and_live_tokens_count_what_a_mask_keeps(pattern, cached, new, sequences):
    part = Part(sequences, cached, new)
    pairs, (sinks, live) = work.pairs(pattern, part), work.live_tokens(pattern, part)
    for layer, head in np.ndindex(pairs.shape):
        rows = [seen(pattern, layer, head, p, cached + new) for p in range(cached, cached + new)]
        assert pairs[layer, head] == sum(map(len, rows))
        assert sinks[layer, head] + live[layer, head] == len(set().union(*rows))


@given(st.integers(0, 500), st.integers(1, 500))
def test_a_dense_pattern_keeps_every_pair(cached, new):
    dense, part = patterns.uniform(1.0, HEADS_2), Part(1, cached, new)
    assert (work.pairs(dense, part) == work.dense_pairs(part)).all()
    case = Case("chunk", HEADS_2, dense, cached + new, 3, new)
    assert work.flops(case).tolist() == [work.dense_flops(case)]
    assert work.kv_bytes(case).tolist() == [work.dense_kv_bytes(case)]


def test_known_figures() -> None:
    """facts of a dense layer of Llama-3-8B at 32k: 8.8 TFLOP, 134 MB."""
    dense = patterns.uniform(1.0, LLAMA_8B)
    prefill, decode = Case("prefill", LLAMA_8B, dense, 32768), Case("decode", LLAMA_8B, dense, 32768, 32)
    assert work.flops(prefill)[0] == pytest.approx(8.8e12, rel=0.01)
    assert work.kv_bytes(decode)[0] == 32 * 32768 * 8 * 512
    eight_bit = Case("decode", LLAMA_8B, dense, 32768, 32, kv="fp8")
    assert 1.9 < work.kv_bytes(decode)[0] / work.kv_bytes(eight_bit)[0] < 2


def test_a_hybrid_step_is_the_sum_of_its_sides() -> None:
    case = Case("hybrid", LLAMA_8B, patterns.published(LLAMA_8B), 8192, 3, 512, prompts=2)
    sides = case.side(0), case.side(1)
    assert [side.parts for side in sides] == [(part,) for part in case.parts]
    for count in (work.flops, work.kv_bytes):
        assert (count(case) == count(sides[0]) + count(sides[1])).all()


def test_the_grid_names_every_case_once_and_covers_the_issue() -> None:
    cases = [case for tier in tiers() for case in tier]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.heads for case in cases} == set(HEADS)
    assert {case.kind for case in cases} == {"prefill", "chunk", "decode", "hybrid"}
    assert {case.kv for case in cases} == {"bf16", "fp8", "int8"}
    assert {4096, 8192, 16384, 32768, 65536, 131072} <= {case.tokens for case in cases}
    assert {"uniform 12.5 %", "uniform 25 %", "uniform 50 %", "dense", "MoA rules"} <= {c.pattern.name for c in cases}
    for case in cases:
        assert case.pattern.rules.alpha.shape[1] == case.heads.kv_heads
        assert all(part.cached >= 0 and part.new > 0 and part.sequences > 0 for part in case.parts)
    for case in cases:
        if case.kind == "hybrid":
            assert {case.side(0).name, case.side(1).name} <= {other.name for other in cases}
    assert {case.kind for case in cases[:12]} >= {"prefill", "chunk", "decode"}, "what matters comes first"


def test_published_rules_keep_about_half() -> None:
    for heads in HEADS:
        pattern = patterns.published(heads)
        assert 0.35 < pattern.rules.density_ratio(32768) < 0.6
        assert all(len(set(map(tuple, layer))) == 2 for layer in zip_rules(pattern))


def zip_rules(pattern: Pattern):
    return [list(zip(*layer, strict=True)) for layer in zip(pattern.rules.alpha, pattern.rules.beta_fixed, strict=True)]
