"""Questions about one of many documents, as RULER defines them; the documents are generated, or supplied in a file."""

from __future__ import annotations

import random
from collections.abc import Sequence

from moa.eval.longtext.draft import Draft, Wanted
from moa.eval.longtext.passages import Asked, Library, from_file, made_up

ONLY = "Only give me the answer and do not output any other words."
QUESTION = (
    "Answer the question based on the given documents. {only}\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. {only}\n\nQuestion: {query}"
)
PREFIX = "Answer:"
DOCUMENT = "Document {i}:\n{document}"
SHUFFLE_SEED = 42
# A made-up document has at least 40 tokens, and half of them are lives
TOKENS_PER_PERSON = 80
LEAST_PEOPLE = 64


def draw(hops: int, wanted: Wanted, rng: random.Random, units: int) -> Draft:
    """A sample with `units` documents."""
    library = _library(hops, wanted)
    asked = library.questions[wanted.index % len(library.questions)]
    context, depth_ratio = documents(rng, library.passages, asked, units)
    return Draft(QUESTION.format(only=ONLY, context=context, query=asked.question), PREFIX, asked.answers, depth_ratio)


def _library(hops: int, wanted: Wanted) -> Library:
    supplied = wanted.options.get("passages_file")
    if supplied:
        return from_file(str(supplied))
    people = max(LEAST_PEOPLE, wanted.count, wanted.length_tokens // TOKENS_PER_PERSON)
    return made_up(wanted.seed, people, hops)


def documents(rng: random.Random, passages: Sequence[str], asked: Asked, count: int) -> tuple[str, float]:
    """`count` numbered documents, those that the question needs among them, and where the first of these begins.

    Raises:
        ValueError: there is no room for those, or there are not so many others.
    """
    others = [i for i in range(len(passages)) if i not in asked.passages]
    wanted = count - len(asked.passages)
    if not 0 <= wanted <= len(others):
        raise ValueError(f"{count} documents of {len(passages)}, {len(asked.passages)} of them needed")
    chosen = [*asked.passages, *rng.sample(others, wanted)]
    random.Random(SHUFFLE_SEED).shuffle(chosen)
    shown = [DOCUMENT.format(i=i, document=passages[at]) for i, at in enumerate(chosen, 1)]
    context = "\n\n".join(shown)
    first = min(chosen.index(at) for at in asked.passages)
    return context, (sum(map(len, shown[:first])) + 2 * first) / len(context)
