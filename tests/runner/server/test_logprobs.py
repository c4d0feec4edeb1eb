"""Tokens that are parts of characters: their bytes are their own, and offsets go on behind those that make none."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moa.runner.request import TokenLogprobs
from moa.runner.server.logprobs import CompletionLogprobs, chat_logprobs
from moa.runner.server.texts import Texts


def byte_level() -> Tokenizer:
    """A token per byte, as GPT-2 names them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback() -> Tokenizer:
    """Letters, and bytes for all else, as Llama 2 has them."""
    names = ["<unk>", "▁", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    spaces = decoders.Replace("▁", " ")
    made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


@pytest.fixture(params=[byte_level, byte_fallback])
def texts(request):
    made = Texts(PreTrainedTokenizerFast(tokenizer_object=request.param()))
    yield made
    made.close()


def scores_of(tokens) -> list[TokenLogprobs]:
    return [TokenLogprobs(token, -1.0, 1, ((token, -1.0),)) for token in tokens]


@pytest.mark.parametrize("text", ["a b", "ab é 你 😀", "\ufffd"])
def test_bytes_of_a_chats_tokens_add_up_to_its_text(texts, text):
    tokens = texts._encoded(text, add_special_tokens=False)
    content = chat_logprobs(texts, scores_of(tokens))["content"]
    assert b"".join(bytes(each["bytes"]) for each in content) == text.encode()
    assert all(each["bytes"] == each["top_logprobs"][0]["bytes"] for each in content)


def test_offsets_go_on_behind_bytes_that_make_no_character():
    """A part of a character, then a byte that is never one, then a letter: the decoder gives up on those before it."""
    tokenizer = byte_fallback()
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    names = ["a", "<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "b", "a", "b"]
    tokens = [tokenizer.token_to_id(name) for name in names]
    told = CompletionLogprobs(texts).of_prompt(tokens, scores_of(tokens[1:]))["text_offset"]
    texts.close()
    assert told == [0, 1, 1, 1, 2, 2, 4, 5]  # the lone byte reads as one U+FFFD, told with the letter behind it
