"""Text as it comes: what is shown adds up to what the tokens read, cut at the first stop string, and never taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moa.runner.text import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, so that characters are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces(tokenizer, text: str, stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stops)
    shown = []
    for token in tokenizer(text)["input_ids"]:
        shown.append(stream.add(token))
        if stream.is_stopped:
            return shown
    return [*shown, stream.rest()]


@given(text=st.text(st.sampled_from("abcä€😀 \n"), max_size=30))
def test_pieces_are_whole_characters_that_add_up(tokenizer, text: str) -> None:
    shown = pieces(tokenizer, text)
    assert "".join(shown) == text
    assert all("�" not in piece for piece in shown)


@given(
    text=st.text(st.sampled_from("abä"), max_size=30),
    stops=st.lists(st.text(st.sampled_from("abä"), min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
)
def test_nothing_of_a_stop_string_is_ever_shown(tokenizer, text: str, stops: tuple[str, ...]) -> None:
    shown = "".join(pieces(tokenizer, text, stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
        return
    # the first stop string that is complete ends the text; of those that end together, the one that begins first
    end = min(ends)
    assert shown == text[: min(end - len(stop) for stop in stops if text[:end].endswith(stop))]


def test_what_may_begin_a_stop_string_is_held_back(tokenizer) -> None:
    assert pieces(tokenizer, "ab<e", ("<end>",)) == ["a", "b", "", "", "<e"]
    assert pieces(tokenizer, "a<x", ("<end>",)) == ["a", "", "<x", ""]
    assert pieces(tokenizer, "é", ("é",)) == ["", ""]


def test_a_character_that_is_never_finished_is_not_shown(tokenizer) -> None:
    stream = TextStream(tokenizer)
    for token in tokenizer("a😀")["input_ids"][:-1]:
        assert stream.add(token) in ("a", "")
    assert stream.rest() == ""


def test_the_first_word_keeps_the_space_before_it() -> None:
    vocab = {"<unk>": 0, "▁Paris": 1, "▁is": 2, "▁a": 3, "<0xF0>": 4, "<0x9F>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert TextStream(wrapped, (), [1, 2]).add(3) == " a"
    assert TextStream(wrapped).add(3) == "a"
    assert TextStream(wrapped, (), [1, 4, 5]).add(3) == "a", "a prompt that ends within a character is left out"


@pytest.fixture(scope="module")
def fallback() -> PreTrainedTokenizerFast:
    """Words, and a token per byte for all else, as Llama 2's and Mistral's."""
    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_that_turn_out_to_be_no_character_do_not_end_a_text(fallback) -> None:
    stream = TextStream(fallback, prompt=[1])
    half = [3 + byte for byte in "你".encode()[:2]]
    shown = [stream.add(token) for token in [1, *half, 3 + 0xFF, 1, 2, *(3 + byte for byte in "你".encode()), 1]]
    text = "".join(shown)
    assert text.startswith(" a�")
    assert text.endswith(" ab你 a")
    assert text.strip("� ab") == "你"


@given(st.lists(st.sampled_from([1, 2, *(3 + byte for byte in b"\xe4\xbd\xa0\xff\x80a")]), max_size=40))
def test_any_tokens_have_a_text(fallback, tokens) -> None:
    stream = TextStream(fallback, prompt=[1])
    shown = "".join(stream.add(token) for token in tokens)
    assert shown.replace("�", "").count("b") == tokens.count(2)
    assert shown.count(" a") == tokens.count(1)


def test_tokens_without_end_that_show_nothing_are_read_a_few_at_a_time(fallback) -> None:
    stream = TextStream(fallback, prompt=[1])
    shown = [stream.add(3 + 0x80) for _ in range(200)]
    assert len(stream._pending) < 8
    assert "".join(shown).count("�") >= 190
    assert stream.add(1).endswith(" a")
