"""A tokenizer that can write English, trained on generated prose, in a model folder of its own."""

from __future__ import annotations

from itertools import islice

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
def english_folder(english, save_llama, tmp_path_factory):
    """A random two-layer Llama with that tokenizer; read only."""
    folder = tmp_path_factory.mktemp("english") / "model"
    save_llama(folder, english, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return folder
