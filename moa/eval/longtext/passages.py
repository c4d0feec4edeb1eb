"""Passages to answer questions from: made up here, or supplied in a file of JSON lines."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moa.errors import DataError
from moa.eval.longtext.prose import PERSONS
from moa.eval.longtext.words import ADJECTIVES, NOUNS

SURNAMES = tuple(
    first + last
    for first in "Ash Bex Corn Dal Elder Fen Green Hal Kes Lang Mar Nor Oak Pen Ral Stan Thorn Wes Whit Yar".split()
    for last in "bury croft dale field ford gate ham ley more ridge sted wick".split()
)
TOWN_ENDS = tuple("bridge brook burgh cliff cross haven mouth port stead water".split())
COUNTRIES = tuple(
    "Alderia Brennia Calvora Dorvania Estmark Falloria Gandria Hestland Istrovia Jorvania Kelmark Lorenna".split()
)
TRADES = tuple(
    "architect astronomer botanist carpenter composer engraver geologist lawyer navigator painter printer surgeon".split()
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, every answer that counts as right, and which of the passages it needs."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Library:
    """Passages and questions about them."""

    passages: tuple[str, ...]
    questions: tuple[Asked, ...]


@lru_cache(maxsize=4)
def made_up(seed: int, people: int, hops: int) -> Library:
    """Lives of made-up people, and the towns they were born in; every answer stands in one passage only.

    Args:
        seed: of the random numbers.
        people: how many.
        hops: 1 asks for what a life says, 2 for the country of somebody's birthplace, which another passage says.
    """
    rng = random.Random(f"{seed}-passages")
    names = rng.sample([f"{first} {last}" for first in PERSONS for last in SURNAMES], people)
    towns = _towns(rng, people)
    lives = tuple(_life(rng, name, town) for name, town in zip(names, towns, strict=True))
    places = tuple((town, *_place(rng, town)) for town in towns)
    passages = (*lives, *(text for _, _, text in places))
    if hops == 1:
        asked = [Asked(f"In which town was {names[i]} born?", (towns[i],), (i,)) for i in range(people)]
    else:
        asked = [
            Asked(f"In which country lies the town where {names[i]} was born?", (places[i][1],), (i, people + i))
            for i in range(people)
        ]
    rng.shuffle(asked)
    return Library(passages, tuple(asked))


def _towns(rng: random.Random, count: int) -> list[str]:
    starts = [word.capitalize() for word in (*ADJECTIVES, *NOUNS) if len(word) <= 6]
    return rng.sample([start + end for start in starts for end in TOWN_ENDS], count)


def _life(rng: random.Random, name: str, town: str) -> str:
    born = rng.randint(1790, 1930)
    trade, other = rng.sample(TRADES, 2)
    facts = [
        f"{name} was born in {town} in {born}.",
        f"{name.split()[0]} trained as {_a(trade)} and later worked as {_a(other)}.",
        f"A {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} that {name} owned is kept in a private collection.",
        f"{name} retired in {born + rng.randint(55, 75)} and wrote {rng.randint(2, 19)} books.",
    ]
    return " ".join(facts)


def _place(rng: random.Random, town: str) -> tuple[str, str]:
    country = rng.choice(COUNTRIES)
    text = (
        f"{town} is a town in {country} with {rng.randint(2, 89)},{rng.randint(100, 999)} inhabitants. "
        f"It is known for its {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} and for the annual fair of the "
        f"{rng.choice(NOUNS)}. The railway reached {town} in {rng.randint(1850, 1910)}."
    )
    return country, text


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@lru_cache(maxsize=4)
def from_file(path: str) -> Library:
    """Passages of JSON lines `{"passage": ..., "question": ..., "answers": [...]}`; rows without a question only distract.

    Raises:
        DataError: the file cannot be read, or a row is not of that form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    passages: dict[str, int] = {}
    asked = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            passage, question, answers = _row(f"{path}:{number}", line)
            at = passages.setdefault(passage, len(passages))
            if question:
                asked.append(Asked(question, answers, (at,)))
    if not asked:
        raise DataError(f"{path}: no question in it; wanted rows of passage, question and answers")
    return Library(tuple(passages), tuple(asked))


def _row(where: str, line: str) -> tuple[str, str, tuple[str, ...]]:
    try:
        row = json.loads(line)
        passage, question, answers = row["passage"], row.get("question", ""), row.get("answers", [])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: wanted an object with a passage: {error}") from None
    texts = isinstance(passage, str) and isinstance(question, str) and isinstance(answers, list)
    if not (
        texts and all(isinstance(answer, str) and answer for answer in answers) and bool(question) == bool(answers)
    ):
        raise DataError(
            f"{where}: passage and question must be text, answers a list of texts for a row with a question"
        )
    return passage, question, tuple(answers)
