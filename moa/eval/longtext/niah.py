"""Needles in a haystack, as RULER defines them (arXiv 2404.06654, appendix B); its templates are under Apache-2.0.

A needle is `One of the special magic numbers for KEY is: VALUE.` Random numbers are drawn in the order in which
lm-eval 0.4.13 draws them, so that one seed and one list of words give one text here and there.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from moa.eval.longtext.draft import Draft, Wanted
from moa.eval.longtext.prose import NOISE, essay_words, split_sentences
from moa.eval.longtext.words import compounds

Haystack = Literal["essay", "repeat", "needle"]
Kind = Literal["words", "numbers", "uuids"]

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = "The special magic {kind} for {query} mentioned in the provided text {verb}"
# 40 places, in hundredths of the text; rounded as RULER does
DEPTHS = tuple(round(i * 100 / 39) for i in range(40))
SHUFFLE_SEED = 42


@dataclass(frozen=True, slots=True)
class Needles:
    """Which needles lie in which haystack.

    Args:
        haystack: generated prose, one sentence over and over, or distracting needles.
        keys, values: what names a needle, and what it holds.
        n_keys, n_values, n_queries: needles stated, values of each, and how many are asked for.
    """

    haystack: Haystack
    keys: Kind = "words"
    values: Kind = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1

    @property
    def count(self) -> int:
        """Needles in the text."""
        return max(self.n_keys, self.n_queries) * self.n_values

    @property
    def kind(self) -> str:
        """What is asked for, in the singular where it is one."""
        return self.values[:-1] if self.n_queries * self.n_values == 1 else self.values


@dataclass(frozen=True, slots=True)
class Hidden:
    """A text with needles in it: what was stated, what is asked, and where the first needle asked for begins."""

    context: str
    query: str
    answers: tuple[str, ...]
    depth_ratio: float


def draw(needles: Needles, wanted: Wanted, rng: random.Random, units: int) -> Draft:
    """A sample whose haystack has `units` words of prose, sentences, or distracting needles."""
    hidden = hide(needles, rng, units, compounds(), f"{wanted.seed}-essay")
    return Draft(
        question(needles, hidden.context, hidden.query),
        prefix(needles, hidden.query),
        hidden.answers,
        hidden.depth_ratio if needles.n_queries * needles.n_values == 1 else None,
    )


def hide(needles: Needles, rng: random.Random, units: int, words: Sequence[str], essay: str) -> Hidden:
    """Needles in their haystack.

    Args:
        words: names are drawn from these.
        essay: name of the prose.

    Raises:
        ValueError: there are fewer units than needles.
    """
    values: dict[str, list[str]] = {}
    keys, stated = [], []
    for _ in range(max(needles.n_keys, needles.n_queries)):
        key = _random(rng, needles.keys, words)
        keys.append(key)
        values[key] = []
        for _ in range(needles.n_values):
            values[key].append(_random(rng, needles.values, words))
            stated.append(NEEDLE.format(kind=needles.values, key=key, value=values[key][-1]))
    random.Random(SHUFFLE_SEED).shuffle(stated)
    if needles.haystack == "essay":
        context = _in_prose(rng, stated, _prose(essay, units))
    else:
        context = _in_lines(rng, stated, _hay(needles, rng, units, words))
    asked = [keys[i] for i in rng.sample(range(len(keys)), needles.n_queries)]
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    first = min(context.find(f" for {key} is: ") for key in asked)
    answers = tuple(value for key in asked for value in values[key])
    return Hidden(context, query, answers, max(0, first) / len(context))


def question(needles: Needles, context: str, query: str) -> str:
    """The prompt, in the singular where one thing is asked for."""
    template = TEMPLATE
    if needles.kind != needles.values:
        for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            template = template.replace(plural, singular)
    return template.format(kind=needles.kind, context=context, query=query)


def prefix(needles: Needles, query: str) -> str:
    """How the answer begins."""
    return PREFIX.format(kind=needles.kind, query=query, verb="is" if needles.kind != needles.values else "are")


def _random(rng: random.Random, kind: Kind, words: Sequence[str]) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return rng.choice(words)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _in_prose(rng: random.Random, stated: Sequence[str], sentences: Sequence[str]) -> str:
    at = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(DEPTHS, len(stated)))
    bounds = [0, *at, len(sentences)]
    parts = []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        parts.append(" ".join(sentences[start:stop]))
        parts += stated[i : i + 1]
    return " ".join(parts)


def _in_lines(rng: random.Random, stated: Sequence[str], hay: Sequence[str]) -> str:
    lines = [*hay]
    places = sorted(rng.sample(range(len(hay)), len(stated)), reverse=True)
    for place, needle in zip(places, stated, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def _hay(needles: Needles, rng: random.Random, units: int, words: Sequence[str]) -> list[str]:
    """Lines without the needles that count: one sentence over and over, or other needles."""
    if needles.haystack == "repeat":
        return [NOISE] * units
    return [
        NEEDLE.format(
            kind=needles.values, key=_random(rng, needles.keys, words), value=_random(rng, needles.values, words)
        )
        for _ in range(units)
    ]


@lru_cache(maxsize=64)
def _prose(essay: str, n_words: int) -> tuple[str, ...]:
    return tuple(split_sentences(" ".join(essay_words(essay, n_words))))
