"""Every text has its exact length, knows only the vocabulary's words, and holds what it asks for."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.demo import language
from moa.demo.language import FAMILIES, KEYS, PERSONS, PLACES, TOPICS, VALUES, Sample, recall_sample

WORDS = set(language.vocabulary())


def read(text: list[str]) -> dict[str, list[str]]:
    """The codes that a text states, by key, read as a person would: from its sentences alone."""
    codes: dict[str, list[str]] = {}
    shared: dict[str, str] = {}
    for sentence in " ".join([*text, ""]).split(" . "):
        words = sentence.split()
        for i in range(len(words)):
            match words[i : i + 5]:
                case ["the", "code", "of", key, "is"]:
                    assert key not in codes, f"two codes for {key}"
                    codes[key] = words[i + 5 :]
                case ["the", "codes", "of", key, "are"]:
                    assert key not in codes, f"two lists of codes for {key}"
                    codes[key] = words[i + 5 :]
                case [key, "shares", "the", "code", "of"]:
                    shared[key] = words[i + 5]
    return {**codes, **{key: codes[other] for key, other in shared.items() if other in codes}}


def asked_key(sample: Sample, start: int) -> str:
    """The key of the question whose answer begins at `start`."""
    return sample.words[start - 2]


@given(
    seed=st.integers(0, 1 << 40),
    n_tokens=st.integers(64, 3000),
    family=st.sampled_from(FAMILIES),
    n_questions=st.integers(1, 16),
    words_per_fact=st.sampled_from([20, 40, 200]),
)
@settings(max_examples=150)
def test_answers_follow_from_the_text(seed, n_tokens, family, n_questions, words_per_fact) -> None:
    try:
        sample = recall_sample(random.Random(seed), n_tokens, family, n_questions, words_per_fact)
    except ValueError as error:
        assert n_tokens < 64 * n_questions + 1 or words_per_fact == 20  # a bound on when it may refuse
        assert "ask for more words" in str(error)  # noqa: PT017 - refusing is one of two right answers
        return
    assert len(sample.words) == n_tokens
    assert {*sample.words} <= WORDS
    assert sample.words[0] == "<bos>"
    assert len(sample.questions) == (1 if family == "single" else n_questions)
    tail = sample.words.index("question")
    codes = read(list(sample.words[1:tail]))
    keys = [asked_key(sample, q.start) for q in sample.questions]
    assert len({*keys}) == len(keys)
    for question, key in zip(sample.questions, keys, strict=True):
        assert question.family == family
        assert list(sample.words[question.start : question.stop]) == codes[key]
        assert sample.words[question.stop] == "."
        assert 0 <= question.depth_ratio < 1
        place = round(question.depth_ratio * n_tokens)
        assert key in sample.words[place : place + 8] or family == "chain"
        assert len(codes[key]) == len({*codes[key]}) >= (2 if family == "multivalue" else 1)


@given(seed=st.integers(0, 1 << 40), family=st.sampled_from(FAMILIES))
def test_a_seed_decides_everything(seed, family) -> None:
    args = (512, family, 4)
    assert recall_sample(random.Random(seed), *args) == recall_sample(random.Random(seed), *args)


def test_facts_lie_everywhere() -> None:
    depths = []
    for seed in range(40):
        for family in FAMILIES:
            sample = recall_sample(random.Random(f"{seed}-{family}"), 600, family, 1 if family == "single" else 8)
            depths += [q.depth_ratio for q in sample.questions]
    for low in (0.0, 0.2, 0.4, 0.6):
        assert sum(low <= d < low + 0.2 for d in depths) > len(depths) / 10


def test_a_chain_needs_both_its_sentences() -> None:
    """The asked key never stands beside its value."""
    sample = recall_sample(random.Random(1), 800, "chain", 8)
    text = " ".join(sample.words[: sample.words.index("question")])
    for question in sample.questions:
        key = asked_key(sample, question.start)
        assert f"{key} shares the code of " in text
        assert f"the code of {key} is" not in text


@pytest.mark.parametrize("n_tokens", [0, 1, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_without_room_are_refused(n_tokens, family) -> None:
    with pytest.raises(ValueError, match=f"{n_tokens} words leave no room"):
        recall_sample(random.Random(0), n_tokens, family, 1)


def test_the_vocabulary_has_no_word_twice() -> None:
    words = language.vocabulary()
    assert len(words) == len({*words})
    assert {*language.SPECIAL_TOKENS, *PERSONS, *PLACES, *KEYS, *VALUES} <= {*words}
    assert (len(KEYS), len(VALUES)) == (language.N_KEYS, language.N_VALUES)
    assert not {*KEYS} & {*PERSONS, *PLACES, *VALUES}
    assert all(word.split() == [word] for word in words)


@given(st.integers(0, 1 << 40))
def test_sentences_agree_in_topic_and_number(seed) -> None:
    _, adjective, noun, verb, _, other, thing, stop = language.sentence(random.Random(seed))
    (topic,) = (t for t in TOPICS if adjective in t[0])
    assert other in topic[0]
    assert thing in topic[1]
    assert (noun in topic[1]) == (verb.removesuffix("s") in topic[2] and verb not in topic[2])
    assert noun.removesuffix("s") in topic[1]
    assert stop == "."


@given(st.integers(0, 1 << 40))
def test_a_paragraph_returns_to_its_person_and_place(seed) -> None:
    first, *middle, last = language.paragraph(random.Random(seed))
    assert last[2] == first[0] in PERSONS
    assert last[5] == first[4] in PLACES
    assert 2 <= len(middle) <= 7
    assert {word for words in middle for word in words} <= WORDS


def test_the_filler_does_not_end() -> None:
    assert len(list(islice(language.filler(random.Random(0)), 500))) == 500


@given(
    seed=st.integers(0, 1 << 40),
    family=st.sampled_from(FAMILIES),
    count=st.integers(1, 200),
    lexicon=st.sampled_from([4, 16, 128]),
)
def test_facts_have_keys_of_their_own(seed, family, count, lexicon) -> None:
    facts = language.make_facts(random.Random(seed), family, count, lexicon)
    keys = [key for fact in facts for key in (fact.key, fact.other) if key]
    assert len(keys) == len({*keys})
    assert {*keys} <= {*KEYS[:lexicon]}
    assert len(facts) == min(count, lexicon // (2 if family == "chain" else 1))
    for fact in facts:
        assert {*fact.values} <= {*VALUES[:lexicon]}
        assert len({*fact.values}) == len(fact.values)
        assert fact.question()[-2] == fact.key
