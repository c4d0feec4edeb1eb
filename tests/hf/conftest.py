"""Tiny random models whose attention is sharp enough that one wrong key changes tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moa.hf import model_shape
from moa.hf.attention import _bindings
from moa.plan import Plan

GREEDY = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}
RULES = (((0, 0.5), (20, 0.0), (0, 1.0), (20, 0.0)), ((0, 0.0), (0, 1.0), (0, 1.0), (60, 0.0)))


def make_model(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A two-layer Llama, 8 query and 4 KV heads."""
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    config = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, "pad_token_id": 0, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def make_plan(model: PreTrainedModel, rules: object = RULES, **fields: object) -> Plan:
    """A plan with small spans, so that keys drop early."""
    return Plan.model_validate(
        {"model": model_shape(model), "rules": rules, "sink_tokens": 4, "min_span_tokens": 16, **fields}
    )


def traces(model: PreTrainedModel) -> list[Any]:
    """Everything about a model and its modules that attaching touches."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    names = [sorted(vars(m)) for m in model.modules()]
    configs = [m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)]
    return [hooks, names, configs, deepcopy(model.config), len(_bindings)]


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def plan(model: PreTrainedModel) -> Plan:
    return make_plan(model)


@pytest.fixture
def prompts() -> torch.Tensor:
    """Token ids [2, 150], none of them padding."""
    return torch.randint(3, 128, (2, 150), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Makers of other models and plans, what attaching leaves on a model, and the arguments of greedy generation."""
    makers: dict[str, Callable[..., object]] = {"model": make_model, "plan": make_plan, "traces": traces}
    return SimpleNamespace(**makers, greedy=GREEDY)
