"""Texts that are too long by their characters alone are refused before they are written in tokens; no other text is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moa.runner.server.failures import ApiError
from moa.runner.server.longest_text import most_token_chars
from moa.runner.server.texts import Texts


def byte_level(normalizer=None, splits=()) -> Tokenizer:
    """Bytes, and "aa" and "aaaa" as tokens."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa", "aaaa"]
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "a"), ("aa", "aa")]))
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    return made


NFC = byte_level(normalizers.NFC())


@given(text=st.text(st.sampled_from("ab ä\u0301\u03b1\u0313\u0300\u0345😀"), max_size=40))
def test_no_text_has_fewer_tokens_than_its_characters_say(text):
    assert len(text) <= most_token_chars(NFC) * len(NFC.encode(text).ids)


def test_the_longest_token_is_the_bound():
    assert most_token_chars(byte_level()) == 4
    assert most_token_chars(NFC) == 16


def with_greedy_token() -> Tokenizer:
    made = byte_level()
    made.add_tokens([AddedToken("<x>", lstrip=True)])
    return made


def words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))


UNBOUND = [
    with_greedy_token(),
    words(),
    byte_level(normalizers.Strip()),
    byte_level(normalizers.Replace("aa", "a")),
    byte_level(splits=[pre_tokenizers.WhitespaceSplit()]),
    byte_level(splits=[pre_tokenizers.Split(" ", "removed")]),
]


@pytest.mark.parametrize("tokenizer", UNBOUND)
def test_tokenizers_that_leave_something_out_have_no_bound(tokenizer):
    assert most_token_chars(tokenizer) is None


def test_a_text_that_is_surely_too_long_is_not_written_in_tokens(monkeypatch):
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=byte_level()))
    texts.longest_tokens = 10
    assert len(texts._encoded("a" * 40, add_special_tokens=False)) == 10
    monkeypatch.setattr(texts, "_backend", None)
    with pytest.raises(ApiError, match="41 characters") as told:
        texts._encoded("a" * 41, add_special_tokens=False)
    assert (told.value.status, told.value.code) == (400, "context_length_exceeded")
    texts.close()
