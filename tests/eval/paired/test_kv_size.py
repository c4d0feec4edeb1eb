"""KV bytes that reports tell are those that caches hold."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, PreTrainedModel

from moa.eval.paired.kv_size import kv_sizes
from moa.hf import apply
from moa.hf.shape import model_shape
from moa.plan import Plan
from moa.spans import keep

LENGTHS = (1, 5, 97, 150)
RULES = (((0, 0.25), (3, 0.5)), ((0, 1.0), (40, 0.0)))


def model_of(window: int | None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    pad = {"pad_token_id": 0}
    config = (
        MistralConfig(**sizes, **heads, sliding_window=window, **pad)
        if window
        else LlamaConfig(**sizes, **heads, **pad)
    )
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bytes_are_those_of_transformers_cache(window, dtype):
    model = model_of(window, dtype)
    for size in kv_sizes(model, LENGTHS, None):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.ones(1, size.length_tokens, dtype=torch.long), past_key_values=cache)
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        assert size.kv_bytes == size.dense_kv_bytes == held


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("mode", ["running", "pinned"])
def test_a_plans_bytes_are_those_of_the_keys_it_keeps(window, mode):
    model = model_of(window)
    plan = Plan(model=model_shape(model), rules=RULES, sink_tokens=4, min_span_tokens=16, length_mode=mode)
    for size in kv_sizes(model, LENGTHS, plan.span_rules):
        n = size.length_tokens
        starts = plan.span_rules.window_start(n - 1, n).flat
        kept = sum(
            keep(n - 1, key, int(start), 4) and (key < 4 or n - 1 - key < (window or n))
            for start in starts
            for key in range(n)
        )
        assert size.kv_bytes == kept * 2 * 12 * 4
        if window is None:
            assert size.kv_bytes == plan.kv_bytes(n)


def test_a_cache_holds_what_is_told():
    model = model_of(None)
    plan = Plan(model=model_shape(model), rules=RULES, sink_tokens=4, min_span_tokens=16)
    for size in kv_sizes(model, (97, 150), plan.span_rules):
        with apply(model, plan) as attached, torch.no_grad():
            model(torch.ones(1, size.length_tokens, dtype=torch.long), past_key_values=attached.new_cache())
            assert attached.kv_bytes == pytest.approx(size.kv_bytes, rel=0.1)  # storage grows in steps


def test_a_model_of_another_kind_says_nothing():
    model = model_of(None)
    model.config.is_causal = False
    assert kv_sizes(model, LENGTHS, None) == ()
