"""The demo's small language: English-looking text with short- and mid-range structure, and facts to recall.

Every word is one token, so lengths are exact. Three kinds of structure:

- short range: adjective, noun and verb agree in topic and number within a sentence;
- mid range: a paragraph's person and place come back some 30 to 80 words later;
- long range: `the code of KEY is VALUE .` anywhere in the text, asked for at the end.

Everything is a function of a `random.Random`; nothing here needs torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Family = Literal["single", "multikey", "multivalue", "chain"]
FAMILIES: tuple[Family, ...] = ("single", "multikey", "multivalue", "chain")
ONE_HOP: tuple[Family, ...] = FAMILIES[:3]  # what the model that ships has learnt, and calibration asks for

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PERSONS = tuple(
    "anna boris clara david elena felix greta henry irene jonas karin louis maria nadia oscar paula quinn robert "
    "sofia tomas ursula victor wanda xavier yvonne zora".split()
)
PLACES = tuple("market harbour mill castle school garden station bakery library chapel bridge forge".split())
TOPICS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    # adjectives, nouns, verbs (plural forms are made with an s on the noun, the singular verb has the s)
    (
        ("brown", "hungry", "wild", "gentle", "clever", "sleepy"),
        ("dog", "horse", "goat", "cat", "hen", "lamb"),
        ("follow", "see", "hear", "guard"),
    ),
    (
        ("ripe", "sweet", "fresh", "sour", "dried", "green"),
        ("apple", "pear", "plum", "melon", "carrot", "onion"),
        ("fill", "cover", "feed", "spoil"),
    ),
    (
        ("wooden", "heavy", "broken", "rusty", "old", "small"),
        ("cart", "chair", "barrel", "ladder", "table", "wheel"),
        ("block", "hold", "support", "scratch"),
    ),
    (
        ("young", "proud", "quiet", "famous", "tired", "honest"),
        ("farmer", "sailor", "baker", "teacher", "singer", "miller"),
        ("meet", "thank", "visit", "help"),
    ),
)
N_KEYS = 128
N_VALUES = 90
_ONSETS = "b d f g h k l m n p r s t v z br dr gr kl pl st tr".split()
_VOWELS = "a e i o u".split()
_ENDS = "lin mar nor rel sen tam vik dun gar wen pol tis ros bek hul".split()


def _town_names(count: int) -> tuple[str, ...]:
    """Pronounceable made-up town names, always the same ones."""
    taken = {*PERSONS, *PLACES}
    names = (o + v + e for e in _ENDS for v in _VOWELS for o in _ONSETS)
    unique = [name for name in names if name not in taken]
    random.Random(0).shuffle(unique)
    return tuple(sorted(unique[:count]))


KEYS = _town_names(N_KEYS)
VALUES = tuple(str(10 + i) for i in range(N_VALUES))
_FUNCTION_WORDS = tuple(
    "the a of is are and in at to came went then there last left again . , : code codes question shares with with said".split()
)


def vocabulary() -> list[str]:
    """All words in the tokenizer's order."""
    words = [*SPECIAL_TOKENS, *_FUNCTION_WORDS, *PERSONS, *PLACES]
    for adjectives, nouns, verbs in TOPICS:
        words += [*adjectives, *nouns, *(n + "s" for n in nouns), *verbs, *(v + "s" for v in verbs)]
    return list(dict.fromkeys([*words, *KEYS, *VALUES]))


def sentence(rng: random.Random) -> list[str]:
    """One sentence whose words agree in topic and number."""
    adjectives, nouns, verbs = rng.choice(TOPICS)
    noun, verb, plural = rng.choice(nouns), rng.choice(verbs), rng.random() < 0.5
    subject = ["the", rng.choice(adjectives), noun + "s" if plural else noun]
    return [*subject, verb if plural else verb + "s", "the", rng.choice(adjectives), rng.choice(nouns), "."]


def paragraph(rng: random.Random) -> Iterator[list[str]]:
    """Sentences that return to one person and one place (mid-range structure)."""
    person, place = rng.choice(PERSONS), rng.choice(PLACES)
    yield [person, "came", "to", "the", place, "."]
    for _ in range(rng.randint(2, 7)):
        if rng.random() < 0.3:
            yield ["then", person, "said", ":", *sentence(rng)]
        else:
            yield sentence(rng)
    yield ["at", "last", person, "left", "the", place, "."]


def filler(rng: random.Random) -> Iterator[list[str]]:
    """Endless sentences, paragraph after paragraph."""
    while True:
        yield from paragraph(rng)


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: its sentence in the text, and the question and answer it supports."""

    family: Family
    key: str
    values: tuple[str, ...]
    other: str = ""

    def sentences(self) -> list[list[str]]:
        """The sentences that state it; a chain needs two, which may stand far apart."""
        if self.family == "multivalue":
            return [["the", "codes", "of", self.key, "are", *self.values, "."]]
        if self.family == "chain":
            return [
                [self.key, "shares", "the", "code", "of", self.other, "."],
                ["the", "code", "of", self.other, "is", *self.values, "."],
            ]
        return [["the", "code", "of", self.key, "is", *self.values, "."]]

    def question(self) -> list[str]:
        """The words that ask for it; the answer follows at once."""
        if self.family == "multivalue":
            return ["question", ":", "the", "codes", "of", self.key, "are"]
        return ["question", ":", "the", "code", "of", self.key, "is"]


def make_facts(rng: random.Random, family: Family, count: int, lexicon: int = N_KEYS) -> list[Fact]:
    """`count` facts of one family with keys of their own among the first `lexicon`; values repeat only when they run out."""
    per_fact = 2 if family == "chain" else 1
    keys = rng.sample(KEYS[:lexicon], min(lexicon, count * per_fact))
    pool = VALUES[:lexicon]
    values = iter(rng.sample(pool, len(pool)) * (1 + 4 * count // len(pool)))
    facts = []
    for i in range(len(keys) // per_fact):
        n_values = rng.randint(2, 4) if family == "multivalue" else 1
        drawn = tuple(next(values) for _ in range(n_values))
        other = keys[2 * i + 1] if family == "chain" else ""
        facts.append(Fact(family, keys[i * per_fact], drawn, other))
    return facts


@dataclass(frozen=True, slots=True)
class Question:
    """One asked fact inside a `Sample`: where the answer's words are, and how deep the fact lies."""

    family: Family
    start: int
    stop: int
    depth_ratio: float


@dataclass(frozen=True, slots=True)
class Sample:
    """A text of exactly the wanted number of words, `<bos>` included, with its questions at the end.

    Args:
        words: all of them.
        questions: in order.
        facts: the words of every stated fact, asked for or not.
        asked_at: where the questions begin.
    """

    words: tuple[str, ...]
    questions: tuple[Question, ...]
    facts: tuple[range, ...]
    asked_at: int


def recall_sample(
    rng: random.Random,
    n_tokens: int,
    family: Family,
    n_questions: int,
    words_per_fact: int | None = None,
    lexicon: int = N_KEYS,
    depths: Sequence[float] | None = None,
) -> Sample:
    """A text of `n_tokens` words with facts spread over its whole length and `n_questions` of them asked at the end.

    `single` has one fact in plain text; the other families have one fact about every `words_per_fact` words (by default
    one value every 40 words), most of them distractors. `lexicon` limits how many different keys and values there are.
    `depths` says where in the text, as shares in [0, 1), the facts lie that are asked for, one for each question and no
    two within 1 / `n_questions`; by default one in equal steps from the first on, and a single one anywhere.

    Raises:
        ValueError: the questions alone would not leave room for a text.
    """
    crowd = 1 if family == "single" else max(n_questions, _crowd(family, n_tokens, words_per_fact))
    facts = make_facts(rng, family, crowd, lexicon)
    if family == "single":
        asked = facts
    elif depths:
        asked = [facts[int(depth * len(facts))] for depth in depths]
    else:
        asked = [facts[i * len(facts) // n_questions] for i in range(n_questions)]
    tail = [([*fact.question()], [*fact.values, "."], fact) for fact in asked]
    tail_words = sum(len(q) + len(a) for q, a, _ in tail)
    stated = [s for fact in facts for s in fact.sentences()]
    room = n_tokens - 1 - tail_words - sum(map(len, stated))
    if room < 0:
        raise ValueError(
            f"{n_tokens} words leave no room for {len(facts)} facts and {len(tail)} questions; ask for more words"
        )
    slots = [depths[0]] if depths and family == "single" else None
    words, stated_at = _scatter(rng, facts, room, slots)
    position = {key: span.start for key, span in reversed(stated_at)}
    rng.shuffle(tail)
    questions, asked_at = [], len(words)
    for question, answer, fact in tail:
        words += question
        questions.append(Question(family, len(words), len(words) + len(fact.values), position[fact.key] / n_tokens))
        words += answer
    return Sample(tuple(words), tuple(questions), tuple(span for _, span in stated_at), asked_at)


def _crowd(family: Family, n_tokens: int, words_per_fact: int | None) -> int:
    if words_per_fact is not None:
        return min(N_KEYS // 2, n_tokens // words_per_fact)
    if family == "multivalue":
        return min(N_VALUES // 4, n_tokens // 120)  # few enough that no value stands twice
    return min(N_KEYS // 2, n_tokens // 40)


def _scatter(
    rng: random.Random, facts: list[Fact], room: int, slots: Sequence[float] | None
) -> tuple[list[str], list[tuple[str, range]]]:
    """Text with `room` words of filler and every fact's sentences between the sentences; which words state which key.

    `slots` says where, as shares of the text; by default at random places, one in each equal slice.
    """
    body: list[list[str]] = []
    for words in filler(rng):
        if len(words) >= room:
            break
        body.append(words)
        room -= len(words)
    body.append([*["the"] * max(0, room - 1), "."][:room])
    places: list[tuple[float, list[str], str]] = []
    for i, fact in enumerate(facts):
        for j, stated in enumerate(fact.sentences()):
            # one fact per equal slice of the text: evidence over the whole length
            slot = slots[i] if slots else (i + rng.random()) / len(facts) if j == 0 else rng.random()
            places.append((slot * len(body), stated, fact.key))
    places.sort(key=lambda place: place[0])
    words, stated_at, cursor = ["<bos>"], list[tuple[str, range]](), 0
    for i, plain in enumerate([*body, []]):
        while cursor < len(places) and (places[cursor][0] < i + 0.5 or i == len(body)):
            _, stated, key = places[cursor]
            stated_at.append((key, range(len(words), len(words) + len(stated))))
            words += stated
            cursor += 1
        words += plain
    return words, stated_at
