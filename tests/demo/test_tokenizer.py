"""One token per word, both ways, also after saving."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moa.demo import language
from moa.demo.tokenizer import build_tokenizer
from moa.hf.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_ids_are_the_vocabularys_order(tokenizer: PreTrainedTokenizerBase) -> None:
    words = language.vocabulary()
    assert len(tokenizer) == len(words)
    assert tokenizer.convert_ids_to_tokens(list(range(len(words)))) == words
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0, 1, 2, 3,
    )  # fmt: skip


@given(seed=st.integers(0, 1 << 40), n_tokens=st.integers(100, 600), family=st.sampled_from(language.FAMILIES))
def test_a_text_comes_back_and_has_a_token_per_word(tokenizer, seed, n_tokens, family) -> None:
    words = language.recall_sample(random.Random(seed), n_tokens, family, 1).words
    ids = tokenizer(" ".join(words[1:]))["input_ids"]
    assert len(ids) == n_tokens
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == " ".join(words)
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(words[1:])


def test_unknown_words_are_one_token(tokenizer) -> None:
    assert tokenizer("the xyzzy .")["input_ids"] == tokenizer("the <unk> .")["input_ids"]


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "the code of " + language.KEYS[3] + " is 42 ."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == "<bos> " + text
    assert loaded.bos_token == "<bos>"
    batch = loaded([text, "the"], padding=True)["input_ids"]
    assert batch[1][:-2] == [0] * (len(batch[0]) - 2)  # on the left
