"""Nightly: every causal model class that the installed transformers can build small runs as itself, or says why not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moa.errors import ModelError
from moa.hf import apply, model_shape
from moa.hf.support import check_model
from moa.plan import Plan
from moa.runner.engine import Engine
from moa.runner.request import SamplingParams
from moa.runner.settings import EngineSettings

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "word_embed_proj_dim": 64,
    "sliding_window": 24,
    "d_model": 64,
    "ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "query_pre_attn_scalar": 16,
    "num_local_experts": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "is_decoder": True,
}
MOST_PARAMETERS = 50_000_000


def small_config(kind: str) -> PreTrainedConfig:
    """The kind's config with all of `SMALL` that it knows."""
    whole = CONFIG_MAPPING[kind]()
    text = whole.get_text_config(decoder=True)
    names = inspect.signature(type(text)).parameters
    fields = {name: value for name, value in SMALL.items() if name in names or hasattr(text, name)}
    return type(text)(**fields) if text is whole else whole


def built(kind: str, tokens: torch.Tensor) -> PreTrainedModel:
    """A small random model that runs by itself; skips where no generic config makes one.

    Raises:
        ModelError: `check_model` refuses it; found before its weights are made.
    """
    try:
        config = small_config(kind)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # noqa: BLE001 - what a class makes of numbers that were not made for it
        pytest.skip(f"{kind}: no small config: {type(error).__name__}: {error}")
    check_model(model)
    if (count := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
        pytest.skip(f"{kind}: {count:,} parameters at the least")
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config).float().eval()
        model(tokens)
    except Exception as error:  # noqa: BLE001 - as above
        pytest.skip(f"{kind}: does not run by itself: {type(error).__name__}: {error}")
    return model


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # dozens of old classes warn, each of something else
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_class_runs_as_itself_under_a_dense_plan_or_says_why_not(
    kind: str, record_property: pytest.RecordProperty
) -> None:
    tokens = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model = built(kind, tokens)
            want = model(tokens, use_cache=False).logits
            with apply(model, Plan.uniform(model_shape(model), 0, 1.0)) as attachment:
                cache = attachment.new_cache()
                cuts = ((0, 30), (30, 31), (31, 60))
                got = torch.cat([model(tokens[:, a:b], past_key_values=cache).logits for a, b in cuts], 1)
    except ModelError as error:
        record_property("outcome", f"refused: {error}")
        return
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=1e-4)
    record_property("outcome", "runs")


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_class_runs_packed_as_itself_or_says_why_not(kind: str, record_property: pytest.RecordProperty) -> None:
    tokens = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    prompts, params = [tokens[0].tolist(), tokens[1, :33].tolist()], SamplingParams(max_tokens=0, prompt_logprobs=0)
    try:
        with torch.no_grad():
            model = built(kind, tokens)
            wants = [model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1) for prompt in prompts]
        with Engine(model, settings=EngineSettings(token_budget=25, chunk_tokens=20)) as engine:
            done = engine.generate(prompts, params)
    except ModelError as error:
        record_property("outcome", f"refused: {error}")
        return
    for prompt, want, completion in zip(prompts, wants, done, strict=True):
        assert completion.error is None
        got = torch.tensor([row.logprob for row in completion.prompt_logprobs])
        expected = want[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(got, expected, atol=1e-4 * float(want.abs().max()), rtol=1e-4)
    record_property("outcome", "runs")
