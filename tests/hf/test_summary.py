"""What an attachment says of itself is what its cache really holds, and what stock transformers would hold."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, PreTrainedModel

from moa.hf import apply


def windowed(window: int) -> PreTrainedModel:
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, sliding_window=window, pad_token_id=0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bytes_are_those_of_the_stock_cache(make, prompts, window, dtype) -> None:
    model = (windowed(window) if window else make.model()).to(dtype)
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompts, past_key_values=stock)
        with apply(model, make.plan(model)) as attachment:
            model(prompts, past_key_values=attachment.new_cache())
            assert attachment.dense_kv_bytes == sum(x.nbytes for y in stock.layers for x in (y.keys, y.values))


def test_it_tells_spans_bytes_and_the_way_taken(model, plan, prompts, make) -> None:
    with apply(model, plan) as attachment:
        assert "KV: no step yet" in attachment.summary()
        assert "at 4,096 tokens: spans 16 to 4,096, density" in attachment.summary()
        model.generate(prompts[:, :10], **{**make.greedy, "max_new_tokens": 3})
        assert "last step: dense by views (nothing has been dropped yet; one token" in attachment.summary()
        with torch.no_grad():
            model(prompts)
        share = round(100 * attachment.kv_bytes / attachment.dense_kv_bytes)
        assert f"for 2 x 150 tokens, dense 300.00 KiB ({share} %)" in attachment.summary()
        assert "spans have dropped keys" in attachment.summary()
        model.generate(prompts[:1], **make.greedy, num_beams=2)
        assert "for 2 x 189 tokens" in attachment.summary()
        with attachment.disabled():
            assert "disabled: the model runs dense" in attachment.summary()


def test_a_backend_with_one_way_tells_no_way(model, plan, prompts) -> None:
    with apply(model, plan, backend="reference") as attachment, torch.no_grad():
        model(prompts)
        assert "KV:" in attachment.summary()
        assert "last step" not in attachment.summary()
