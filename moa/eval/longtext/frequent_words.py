"""Frequent words, as RULER defines them: the three most frequent of made-up words that follow a zeta distribution."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

import numpy as np
from scipy.special import zeta

from moa.eval.longtext.draft import Draft, Wanted

QUESTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
ALPHA = 2.0
WORD_LETTERS = 6
TOKENS_PER_WORD = 50
LEAST_VOCABULARY = 8
# From here on the fourth and the fifth most frequent always differ
LEAST_WORDS = 150
SHUFFLE_SEED = 42


def draw(wanted: Wanted, rng: random.Random, units: int) -> Draft:
    """A sample for `units` words in all."""
    vocabulary = coded_words(rng, max(LEAST_VOCABULARY, wanted.length_tokens // TOKENS_PER_WORD))
    return Draft(QUESTION.format(context=coded_text(vocabulary, units)), PREFIX, tuple(vocabulary[1:4]))


def coded_words(rng: random.Random, count: int) -> list[str]:
    """Made-up words, the most frequent first; that one is dots, which do not count."""
    words = ["".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS)) for _ in range(count)]
    while len(set(words)) < count:
        words.append("".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS)))
    vocabulary = sorted(set(words))
    random.Random(SHUFFLE_SEED).shuffle(vocabulary)
    return ["...", *vocabulary[1:]]


def coded_text(vocabulary: Sequence[str], n_words: int) -> str:
    """Each word as often as its rank says.

    Raises:
        ValueError: so few words that those asked for do not stand more often than the next.
    """
    ranks = np.arange(1, len(vocabulary) + 1)
    counts = (n_words * ranks**-ALPHA / zeta(ALPHA)).astype(int)
    if counts[3] <= counts[4]:
        raise ValueError(f"{n_words} words do not tell the three most frequent ones apart")
    words = [word for word, count in zip(vocabulary, counts.tolist(), strict=True) for _ in range(count)]
    random.Random(SHUFFLE_SEED).shuffle(words)
    return " ".join(words)
