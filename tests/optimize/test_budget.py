"""Budgets in bytes and milliseconds come to the density that keeps them, and say what is least where they cannot be kept."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import InfeasibleError, UsageError
from moa.optimize.budget import (
    GIB,
    budget_text,
    check_least,
    decode_budget,
    dense_bytes_per_token,
    kv_bytes_budget,
    kv_gib_budget,
)
from moa.optimize.roofline import COMPUTE_RATIO, DEVICES, MEMORY_RATIO, Weights, attention_s, linear_s
from moa.plan import Budget, ModelShape

# Llama-3-8B
SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=32, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
WEIGHTS = Weights(7_504_924_672, 2 * 7_504_924_672)


def test_gib_for_sequences_is_the_share_of_their_dense_cache() -> None:
    assert dense_bytes_per_token(SHAPE) == 131072
    budget = kv_gib_budget("4@131072x8", SHAPE)
    assert (budget.dense_amount, budget.density_ratio) == (128.0, 0.03125)
    assert (budget.context_tokens, budget.sequences, budget.option) == (131072, 8, "--kv-gib 4@131072x8")
    assert kv_gib_budget("4@131072", SHAPE).density_ratio == 0.25
    assert kv_bytes_budget(65536, SHAPE).density_ratio == 0.5


@given(st.integers(1, 10**6), st.integers(1, 200_000), st.integers(1, 64))
def test_bytes_at_the_converted_density_stay_within_the_budget(mib: int, context: int, sequences: int) -> None:
    asked = Fraction(mib, 1000)
    budget = kv_gib_budget(f"{mib // 1000}.{mib % 1000:03}@{context}x{sequences}", SHAPE)
    used = Fraction(str(budget.density_ratio)) * dense_bytes_per_token(SHAPE) * context * sequences
    assert used <= asked * GIB
    assert budget.density_ratio == 1 or used >= asked * GIB * (1 - Fraction(1, 10**12))


def test_decode_time_adds_weights_and_cache_over_the_bandwidth() -> None:
    device = DEVICES["h200"]
    bandwidth = MEMORY_RATIO * device.memory_bytes_per_s
    budget = decode_budget("20@131072x8", "H200", SHAPE, WEIGHTS)
    weights_ms = 1e3 * WEIGHTS.read_bytes / bandwidth
    cache_ms = 1e3 * 8 * 131072 * 131072 / bandwidth
    assert math.isclose(budget.free_amount, weights_ms)
    assert math.isclose(budget.dense_amount, weights_ms + cache_ms)
    assert math.isclose(budget.density_ratio, (20 - weights_ms) / cache_ms)
    assert math.isclose(budget.amount_at(budget.density_ratio), 20)
    assert "0.8 of 4.8 TB/s" in budget.basis
    assert "15.01 GB of weights" in budget.basis
    assert budget.device == "h200"


def test_many_sequences_are_bound_by_arithmetic() -> None:
    device = DEVICES["h100"]
    flops = COMPUTE_RATIO * device.flops_per_s
    assert math.isclose(linear_s(device, WEIGHTS, 4096), 2 * WEIGHTS.parameters * 4096 / flops)
    # attention of 512 query heads to a KV head does 512 FLOP a byte, more than the device's ratio of 295
    wide = SHAPE.model_copy(update={"heads": 8 * 512})
    assert math.isclose(attention_s(device, wide, 1e6), 1e6 * 4 * 128 * 512 / flops)
    assert attention_s(device, SHAPE, 1e6) < attention_s(device, wide, 1e6)


def test_a_budget_above_the_dense_cache_is_dense() -> None:
    budget = kv_gib_budget("1000@131072x8", SHAPE)
    assert budget.density_ratio == 1
    assert "the dense cache fits" in budget_text(budget)


def test_time_below_that_of_the_weights_names_what_they_take() -> None:
    with pytest.raises(InfeasibleError, match=r"without any attention a step of 8 sequences takes 3\.909 ms"):
        decode_budget("3.9@131072x8", "h200", SHAPE, WEIGHTS)


@pytest.mark.parametrize(
    "asked", ["4", "4@", "@131072", "4@131072x", "-4@131072", "0@131072", "4@0", "4@8x0", "x", "1e3@8"]
)
def test_amounts_that_are_none_are_refused(asked: str) -> None:
    with pytest.raises(UsageError, match="--kv-gib must"):
        kv_gib_budget(asked, SHAPE)
    with pytest.raises(UsageError, match="--decode-ms must"):
        decode_budget(asked, "h200", SHAPE, WEIGHTS)


def test_unknown_device_and_bytes_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'h200'"):
        decode_budget("20@131072x8", "h20", SHAPE, WEIGHTS)
    for amount in (0, -1, math.inf, math.nan):
        with pytest.raises(UsageError, match="--kv-bytes-per-token"):
            kv_bytes_budget(amount, SHAPE)


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        (None, r"--density 0\.0625;"),
        (kv_bytes_budget(6000, SHAPE), r"--kv-bytes-per-token 8192;"),
        (kv_gib_budget("1@65536x8", SHAPE), r"--kv-gib 4\.000@65536x8;"),
        (decode_budget("3.95@4096x8", "h200", SHAPE, WEIGHTS), r"--decode-ms 3\.979@4096x8 --device h200;"),
    ],
)
def test_budget_that_cannot_be_met_names_the_tightest_length_and_the_least_value(
    budget: Budget | None, least: str
) -> None:
    density = budget.density_ratio if budget else 0.05
    with pytest.raises(InfeasibleError, match=r"At 1024 tokens, the tightest length, .* keeps 64 tokens.*" + least):
        check_least(density, budget, (1024, 4096, 65536), (64, 64, 64))
    check_least(0.0625, None, (1024, 4096, 65536), (64, 64, 64))


def test_the_least_value_that_is_named_can_be_met() -> None:
    for tokens, n in ((61, 1024), (16, 512), (127, 3001)):
        with pytest.raises(InfeasibleError) as caught:
            check_least(0.001, kv_bytes_budget(131.072, SHAPE), (n,), (tokens,))
        named = float(str(caught.value).split("--kv-bytes-per-token ")[2].split(";")[0])
        check_least(kv_bytes_budget(named, SHAPE).density_ratio, None, (n,), (tokens,))
