"""Generated English prose: what hides the needles, in place of essays that others hold the rights to.

Sentences are grammatical and differ from each other; persons and places of a paragraph come back in it. What they say
means little: a model's perplexity here says nothing about literature.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import islice

from moa.eval.longtext.words import ADJECTIVES, NOUNS

# What RULER, and the pass key task before it, repeat instead.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PERSONS = tuple(
    """
    Abigail Adrian Albert Alice Andrew Arthur Beatrice Benedict Bernard Camille Caroline Catherine Charles Clement Daniel
    Dorothy Edith Edmund Eleanor Emily Ernest Felix Florence Frances George Gilbert Harriet Helen Henry Howard Isabel
    Jacob James Jasper Joseph Judith Julian Laura Leonard Louise Lucas Mabel Margaret Martin Matilda Miriam Nathan Nora
    Oliver Oscar Philip Rachel Robert Rosalind Rupert Samuel Sarah Simon Stella Theodore Thomas Victor Vincent Walter
    """.split()
)
PLACES = tuple(
    "market harbor mill castle school garden station library chapel bridge quarry theater orchard museum hospital court".split()
)
ACTS = tuple(
    """
    admired arranged borrowed bought carried cleaned collected copied covered described discovered displayed drew
    examined fetched filled followed found gathered guarded inspected lifted measured mended moved noticed painted
    polished prepared preserved promised recorded removed repaired replaced returned showed sketched sold sorted
    studied traded valued weighed
    """.split()
)
THOUGHTS = tuple(
    """
    patience comfort fortune memory honesty weather history labor silence progress courage invention friendship money
    habit music science travel hunger duty beauty gossip medicine justice luck winter distance hope fashion order
    """.split()
)
TIMES = tuple(
    """
    in the morning|after lunch|before dawn|at noon|late in the evening|during the storm|on the first day of spring|when
    the bells rang|a week later|by candle light|in the middle of the week|after a long silence|on market day|once a
    month|as soon as the rain stopped|for the second time that year
    """.replace("\n    ", " ")
    .strip()
    .split("|")
)
STARTS = ("Later", "Meanwhile", "As usual", "To nobody's surprise", "In the end", "For once", "Still", "Soon enough")


def sentences(seed: str) -> Iterator[str]:
    """Endless sentences, a function of `seed`."""
    rng = random.Random(f"{seed}-prose")
    while True:
        yield from _paragraph(rng)


def essay_words(seed: str, count: int) -> list[str]:
    """The first `count` words of the prose of `seed`, with their punctuation."""
    return [*islice((word for sentence in sentences(seed) for word in sentence.split()), count)]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, cut behind full stops, question and exclamation marks."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part]


def _paragraph(rng: random.Random) -> Iterator[str]:
    first, second = rng.sample(PERSONS, 2)
    place, theme = rng.choice(PLACES), rng.choice(THOUGHTS)
    yield f"{first} came to the {place} {rng.choice(TIMES)}."
    for _ in range(rng.randint(3, 8)):
        sentence = rng.choice(_PATTERNS)(rng, rng.choice((first, second)), place, theme)
        yield sentence[0].upper() + sentence[1:]
    yield f"{first} left the {place} and thought about {theme}."


def _thing(rng: random.Random) -> str:
    adjective = rng.choice(ADJECTIVES)
    return (
        f"{'an' if adjective[0] in 'aeiou' and not adjective.startswith('u') else 'a'} {adjective} {rng.choice(NOUNS)}"
    )


def _the(rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


_PATTERNS = (
    lambda rng, who, place, theme: f"{who} {rng.choice(ACTS)} {_thing(rng)} near the {place}.",
    lambda rng, who, place, theme: f"{rng.choice(TIMES)}, {who} {rng.choice(ACTS)} {_the(rng)}.",
    lambda rng, who, place, theme: (
        f"{rng.choice(STARTS)}, {who} {rng.choice(ACTS)} {_the(rng)} and {rng.choice(ACTS)} {_thing(rng)}."
    ),
    lambda rng, who, place, theme: f"nobody at the {place} believed that {_the(rng)} belonged to {who}.",
    lambda rng, who, place, theme: f"{who} said that {theme} was worth more than {_thing(rng)}.",
    lambda rng, who, place, theme: f"was {_the(rng)} really older than {_the(rng)}?",
    lambda rng, who, place, theme: f"there was {_thing(rng)} behind the {place}, and {who} {rng.choice(ACTS)} it.",
    lambda rng, who, place, theme: f"{who}, who knew a little about {theme}, {rng.choice(ACTS)} {_the(rng)} twice.",
    lambda rng, who, place, theme: (
        f"because of {_the(rng)}, {who} stayed at the {place} for {rng.randint(2, 30)} days."
    ),
    lambda rng, who, place, theme: f"{_the(rng)} cost {rng.randint(2, 90)} coins, which {who} called a bargain!",
    lambda rng, who, place, theme: f"some people look for {theme} in {_thing(rng)}, others in {_thing(rng)}.",
    lambda rng, who, place, theme: f"{who} wrote a letter about {theme} and {_the(rng)} {rng.choice(TIMES)}.",
)
