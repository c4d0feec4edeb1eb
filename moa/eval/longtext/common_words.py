"""Common words, as RULER defines them: which ten words stand most often in a numbered list.

As in RULER, an example comes first; lm-eval 0.4.13 makes one too, and leaves it out of the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from moa.eval.longtext.draft import Draft, Wanted
from moa.eval.longtext.words import pool

QUESTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
PREFIX = "Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
# Below this many tokens, lists are shorter: how often a common and any other word stands in the list.
SHORT_TOKENS = 4096


def draw(wanted: Wanted, rng: random.Random, units: int) -> Draft:
    """A sample with `units` different words."""
    short = wanted.length_tokens < SHORT_TOKENS
    words = pool(max(units, 40))
    shuffler = random.Random(rng.getrandbits(64))
    example, common = numbered(rng, shuffler, words, 20 if short else 40, *((3, 1) if short else (10, 3)))
    solved = f"{QUESTION.format(context=example)} {PREFIX} " + " ".join(
        f"{i}. {word}" for i, word in enumerate(common, 1)
    )
    context, common = numbered(rng, shuffler, words, units, *((6, 1) if short else (30, 3)))
    return Draft(f"{solved}\n{QUESTION.format(context=context)}", PREFIX, tuple(common))


def numbered(
    rng: random.Random, shuffler: random.Random, words: Sequence[str], n_words: int, often: int, seldom: int
) -> tuple[str, list[str]]:
    """The list as text, and its common words.

    Raises:
        ValueError: there are no more words than common ones.
    """
    if n_words <= COMMON:
        raise ValueError(f"{n_words} words leave none that is not common")
    chosen = rng.sample(words, n_words)
    entries = chosen[:COMMON] * often + chosen[COMMON:] * seldom
    shuffler.shuffle(entries)
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1)), chosen[:COMMON]
