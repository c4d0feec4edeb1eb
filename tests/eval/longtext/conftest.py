"""A tokenizer that can write English, trained on generated prose, in a model folder of its own."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from moa.eval.longtext.prose import sentences


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
def english_folder(english, tmp_path_factory):
    """A random two-layer Llama with that tokenizer; read only."""
    folder = tmp_path_factory.mktemp("english") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(english), **sizes, **heads, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    english.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user's cache of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
