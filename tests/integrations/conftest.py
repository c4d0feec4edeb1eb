"""A small sharp model, and what it would say if the keys that were dropped had been masked."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROMPT, ANSWER = 150, 7


@pytest.fixture
def model():
    sizes = {"vocab_size": 128, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, **heads, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 128, (1, PROMPT + ANSWER), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masked(model, monkeypatch):
    """`masked(ids, kept, n)`: logits [T, V] where queries from n on see of the first n keys those in `kept[layer]`
    [HKV, n], and queries before them see everything.
    """

    def run(ids, kept, n):
        def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
            groups, total = query.shape[1] // key.shape[1], query.shape[2]
            seen = torch.ones(total, total, dtype=torch.bool).tril().repeat(key.shape[1], 1, 1)  # [HKV, T, T]
            seen[:, n:, :n] &= kept[module.layer_idx][:, None]
            key, value, seen = (x.repeat_interleave(groups, dim=x.ndim - 3) for x in (key, value, seen))
            scores = (query.double() @ key.double().mT * scaling).masked_fill(~seen, -torch.inf)
            return (scores.softmax(-1) @ value.double()).float().transpose(1, 2), None

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
            return model(ids, use_cache=False).logits[0]

    return run
