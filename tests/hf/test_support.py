"""What cannot run under a plan is refused, with the reason, before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from moa.errors import ModelError
from moa.hf import apply
from moa.hf.support import check_model
from moa.hf.trial import check_runs
from moa.plan import ModelShape, Plan

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0,
            "rope_theta": 1e4, "original_max_position_embeddings": 64}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
NESTED = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
BART = {"vocab_size": 96, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}


def causal(model_type: str, **fields: Any) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("llama", {**SIZES, "rope_parameters": DYNAMIC}, "'dynamic' rescales the positions of past keys"),
        ("phi3", {**SIZES, "rope_parameters": LONGROPE}, "'longrope' rescales the positions of past keys"),
        ("gemma3_text", {**SIZES, **ALTERNATING, "rope_parameters": NESTED}, "'dynamic' rescales"),
        ("deepseek_v3", SIZES, "multi-head latent attention"),
        ("mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}, "not softmax attention|attention in layers"),
        ("jamba", SIZES, "not softmax attention over all past tokens|attention in layers"),
        ("qwen3_next", SIZES, "linear_attention, which are not softmax attention"),
        ("llama4_text", SIZES, "chunked_attention, which are not softmax attention"),
        ("gemma3n_text", {**SIZES, **ALTERNATING, "num_kv_shared_layers": 2}, "share another layer's keys and values"),
        ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 1, "n_head": 2}, "AttentionInterface"),
        ("bart", BART, "layer 0 has more than one attention"),
        ("bert", SIZES, "not causal; a BERT-like model is a decoder only with config.is_decoder=True"),
    ],
    ids=lambda value: value if isinstance(value, str) and "_" not in value and " " not in value else "",
)  # fmt: skip
def test_a_causal_model_is_refused_with_the_reason(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_model(causal(model_type, **fields))


def test_apply_refuses_what_the_check_refuses() -> None:
    shape = ModelShape(
        architecture="DeepseekV3ForCausalLM", layers=4, heads=4, kv_heads=2, head_dim=64, dtype="float32"
    )
    with pytest.raises(ModelError, match="latent attention"):
        apply(causal("deepseek_v3", **SIZES), Plan.uniform(shape, 0, 0.5))


def test_an_encoder_decoder_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", d_model=32, num_layers=1))
    with pytest.raises(ModelError, match="encoder-decoder; plans are for decoders alone"):
        check_model(model)


def test_a_model_of_text_and_pictures_names_the_class_that_is_text_alone() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3"))
    with pytest.raises(ModelError, match=r"load the language model alone, with Gemma3ForCausalLM\.from_pretrained"):
        check_model(model)


def tiny(model_type: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "initializer_range": 0.2, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        (
            "jetmoe",
            {"kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
            "changes keys between its cache",
        ),
        ("diffllama", {}, "runs twice in a step"),
        ("doge", {}, "4-D attention mask"),
        ("llama", {"sliding_window": 24}, "masks with a sliding window of None tokens, its config says 24"),
    ],
)
def test_a_trial_finds_what_no_config_says(model_type: str, fields: dict[str, Any], reason: str) -> None:
    model = tiny(model_type, **fields)
    with pytest.raises(ModelError, match=reason):
        check_runs(model)
    assert "moa" not in vars(model)


def test_a_trial_finds_attention_that_is_not_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    check_runs(model)
    check_runs(model.to(torch.bfloat16))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    check_runs(model)
    model = tiny("llama")
    from moa.hf import attention

    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, *a, **o: attend(q, k, v.flip(1), *a, **o))
    with pytest.raises(ModelError, match="its logits differ from its own by"):
        check_runs(model)
