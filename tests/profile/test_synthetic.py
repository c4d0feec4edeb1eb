"""Synthetic texts for any tokenizer: exact length, answers that can be recalled, evidence over the whole text."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moa.demo import language
from moa.demo.tokenizer import build_tokenizer
from moa.errors import DataError
from moa.profile import data
from moa.profile.chat import Chat
from moa.profile.synthetic import _Writer, synthetic_samples
from moa.profile.wording import Wording

TEXT = ["The code of a town is 42 . There and back again , said the quiet dog of the market ."] * 50 + [
    "zabcdefghijklmnopqrstuvwxyz 90123456789"
]
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789.,:")


def fast(tokenizer: Tokenizer, **marks: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def bytes_() -> PreTrainedTokenizerFast:
    """As GPT-2's: byte-level BPE; no `<bos>`, nothing unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return fast(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As T5's: unigrams with spaces made visible."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    marks = {"special_tokens": ["<unk>", "<s>"], "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(vocab_size=120, initial_alphabet=LETTERS, show_progress=False, **marks)
    tokenizer.train_from_iterator(TEXT, trainer)
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>")


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, initial_alphabet=LETTERS, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return fast(tokenizer, unk_token="[UNK]")


def words_of(words: list[str], normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """One token per word, and one for all that it does not know."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[unk]", *words])}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer:
        tokenizer.normalizer = normalizer
    return fast(tokenizer, unk_token="[unk]")


def foreign_words() -> PreTrainedTokenizerFast:
    """Words of another language, and two of ours."""
    return words_of([*(f"w{i}" for i in range(900)), "the", "."])


def folded_digits() -> PreTrainedTokenizerFast:
    """Our words, but all numbers of two digits are one token."""
    ours = [word for word in language.vocabulary() if not word.isdigit()]
    more = [a + b + "x" for a in LETTERS[:26] for b in LETTERS[:26]]
    return words_of([*ours, *more, "00"], normalizers.Replace(Regex("[0-9]"), "0"))


def characters() -> PreTrainedTokenizerFast:
    """Characters, of which the space is not one."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["?", *LETTERS])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return fast(tokenizer, unk_token="?")


def joined_characters() -> PreTrainedTokenizerFast:
    """Pieces learnt from text without spaces: they reach over the ends of words and sentences."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=LETTERS, special_tokens=["?"], max_token_length=4, show_progress=False
    )
    tokenizer.train_from_iterator(["".join(TEXT).lower().replace(" ", "")], trainer)
    tokenizer.add_tokens([".t"])
    tokenizer.decoder = decoders.Fuse()
    return fast(tokenizer, unk_token="?")


KINDS = {
    make.__name__: make
    for make in (
        build_tokenizer,
        bytes_,
        sentencepiece,
        wordpiece,
        foreign_words,
        folded_digits,
        characters,
        joined_characters,
    )
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.mark.parametrize("n_tokens", [300, 512, 1001])
def test_texts_have_exactly_their_length_and_their_answers(tokenizer, n_tokens) -> None:
    samples = synthetic_samples(tokenizer, n_tokens, 6, seed=3)
    assert [len(sample.token_ids) for sample in samples] == [n_tokens] * 6
    for sample in samples:
        assert min(sample.answer_positions) >= 1
        assert sample.answer_ids == tuple(sample.token_ids[p] for p in sample.answer_positions)
        assert tokenizer.unk_token_id not in sample.token_ids
        assert sample.truncated_tokens == 0


@pytest.mark.parametrize("n_tokens", [400, 1001])
def test_every_answer_can_be_recalled_from_the_text(tokenizer, n_tokens) -> None:
    """As a reader of tokens would: what followed the key where it stood first is what is wanted where it stands again."""
    wording = Wording.of(tokenizer)
    join = wording.separator.join

    def said(words: list[str]) -> str:
        # without spaces: decoders put them back in their own ways
        return join([wording.stand_ins.get(word, word) for word in words]).replace(" ", "")

    for sample in synthetic_samples(tokenizer, n_tokens, 3, seed=1):
        text = tokenizer.decode(list(sample.token_ids), skip_special_tokens=True).replace(" ", "").replace("##", "")
        mark = said(["question", ":"])
        body, *asked = text.split(mark)
        assert asked
        answers = tokenizer.decode(list(sample.answer_ids)).replace(" ", "").replace("##", "")
        wanted = ""
        for question in asked:
            key = next(key for key in language.KEYS if question.startswith((
                said(["the", "code", "of", key, "is"]), said(["the", "codes", "of", key, "are"])
            )))  # fmt: skip
            assert body.count(question) == 1, question  # stated in the text just as it is answered, and once
            start = next(s for s in (["the", "code", "of", key, "is"], ["the", "codes", "of", key, "are"])
                         if question.startswith(said(s)))  # fmt: skip
            wanted += question.removeprefix(said(start)).removesuffix(said(["."]))
        assert answers.replace(".", "") == wanted  # a token of the answer may hold the full stop too


def test_without_its_filler_a_text_still_states_and_asks_all(tokenizer) -> None:
    writer = _Writer(Chat(tokenizer), Wording.of(tokenizer))
    sample = language.recall_sample(random.Random(0), 300, "multikey", 3)
    written = writer.write(sample)
    left = tokenizer.decode(list(written.without(len(written.filler)).token_ids)).replace(" ", "").replace("##", "")
    assert len(left) < 0.7 * len(writer.wording.write(sample.words)[0].replace(" ", ""))
    for part in (*sample.facts, range(sample.asked_at, len(sample.words))):
        assert writer.wording.write(sample.words[part.start : part.stop])[0].replace(" ", "") in left


def test_no_word_is_lost_or_taken_for_another(tokenizer) -> None:
    wording = Wording.of(tokenizer)
    words = [word for word in language.vocabulary() if word not in language.SPECIAL_TOKENS]
    written = [tuple(tokenizer(wording.write([word])[0], add_special_tokens=False)["input_ids"]) for word in words]
    assert len({*written}) == len(words)
    assert not any(tokenizer.unk_token_id in ids for ids in written)


def test_what_is_asked_lies_at_every_depth(words, monkeypatch) -> None:
    """Of 300 texts the depths of what is asked fill ten buckets evenly, in each family by itself."""
    depths: dict[str, list[float]] = {}
    write = _Writer.write

    def spy(self, sample):
        for question in sample.questions:
            depths.setdefault(question.family, []).append(question.depth_ratio * len(sample.words) / sample.asked_at)
        return write(self, sample)

    monkeypatch.setattr(_Writer, "write", spy)
    synthetic_samples(words, 512, 300, seed=0)
    assert depths.keys() == {*language.ONE_HOP}
    for found in depths.values():
        buckets = Counter(min(9, int(10 * depth)) for depth in found)
        share = len(found) / 10
        assert all(0.5 * share <= buckets[i] <= 1.5 * share for i in range(10)), buckets


def test_seeds_decide_everything(words) -> None:
    first = synthetic_samples(words, 256, 4, seed=1)
    assert first == synthetic_samples(words, 256, 4, seed=1)
    assert first != synthetic_samples(words, 256, 4, seed=2)
    assert data.digest(first) == data.digest(synthetic_samples(words, 256, 4, seed=1))
    assert data.digest(first) != data.digest(first[:3])
    assert synthetic_samples(words, 256, 2, seed=1) == first[:2]


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_too_short_for_a_text(tokenizer, n_tokens) -> None:
    with pytest.raises(DataError, match="longer --lengths"):
        synthetic_samples(tokenizer, n_tokens, 4, seed=0)


def test_a_tokenizer_with_too_few_words_is_refused() -> None:
    with pytest.raises(DataError, match=r"need \d+ words that the tokenizer can tell apart, it has 4; give texts"):
        synthetic_samples(words_of(["a", "c", "g", "t"]), 512, 2, seed=0)


def test_a_wording_leaves_the_demo_s_language_as_it_is(words) -> None:
    assert Wording.of(words) == Wording()
    assert Wording.of(bytes_()) == Wording()
    assert Wording.of(characters()) == Wording("")
    foreign = Wording.of(foreign_words())
    assert "the" not in foreign.stand_ins
    assert len({*foreign.stand_ins.values()}) == len(foreign.stand_ins) > 300


@pytest.mark.parametrize("kind", ["bytes_", "sentencepiece", "characters"])
def test_with_a_template_questions_and_answers_are_turns(kind) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens(["<user>", "<assistant>", "</s>", "\n"])
    tokenizer.chat_template = TEMPLATE
    samples = synthetic_samples(tokenizer, 700, 6, seed=2, chat=Chat.of(tokenizer, "auto"))
    for sample in samples:
        assert len(sample.token_ids) == 700
        text = tokenizer.decode(list(sample.token_ids))
        turns = text.split("<assistant>")[1:]
        assert text.lstrip().startswith("<user>")
        assert turns
        answers = "".join(turn.split("</s>")[0] for turn in turns).translate(str.maketrans("", "", " .\n"))
        assert tokenizer.decode(list(sample.answer_ids)).replace(" ", "") == answers
        if "of" in text.split("<assistant>")[0]:
            assert text.count("<user>") == len(turns)
    assert samples != synthetic_samples(tokenizer, 700, 6, seed=2)
