"""A tiny model, oracles that answer as a test wants, and a user's cache of each test's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moa.demo.tokenizer import build_tokenizer
from moa.hf.shape import model_shape
from moa.plan import Plan


class Oracle(torch.nn.Module):
    """Knows the next token; errs where `wrong(position, n_tokens)` says so, for the token at `position`."""

    def __init__(self, vocabulary: int, wrong):
        super().__init__()
        self.vocabulary, self.wrong = vocabulary, wrong
        self.embedding = torch.nn.Embedding(vocabulary, 1)  # where it wants its tokens
        self.calls = 0

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache, logits_to_keep):
        self.calls += 1
        positions = [before + 1 for before in logits_to_keep]
        wanted = input_ids[0, positions]
        wrong = [self.wrong(p, input_ids.shape[1]) for p in positions]
        said = torch.where(torch.tensor(wrong), (wanted + 1) % self.vocabulary, wanted)
        return SimpleNamespace(logits=10.0 * torch.nn.functional.one_hot(said, self.vocabulary)[None].float())


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def oracle(tokenizer):
    return lambda wrong=lambda position, n_tokens: False: Oracle(len(tokenizer), wrong)


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def plan(model):
    return Plan.uniform(model_shape(model), 0, 0.25, sink_tokens=8, min_span_tokens=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where the user's cache is while a test runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
