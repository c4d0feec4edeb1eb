"""A tiny model, one whose tokenizer writes English, oracles that answer as a test wants, and a cache of each test's own."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moa.demo.tokenizer import build_tokenizer
from moa.eval.longtext.prose import sentences
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


@pytest.fixture(scope="session")
def english():
    """Byte-level BPE of 600 tokens that puts `<s>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(islice(sentences("tokenizer"), 2000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="session")
def english_folder(english, save_llama, tmp_path_factory):
    """A random two-layer Llama with that tokenizer; read only."""
    folder = tmp_path_factory.mktemp("english") / "model"
    save_llama(folder, english, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where the user's cache is while a test runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
