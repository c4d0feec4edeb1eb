"""Variable tracking, as RULER defines it: one chain of assignments in noise, with a short example before it."""

from __future__ import annotations

import random
import string

from moa.eval.longtext.draft import Draft, Wanted
from moa.eval.longtext.prose import NOISE

QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {value} in the text above."
)
# "assgined" is how RULER writes it
PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the value "
    "{value}, they are:"
)
HOPS = 4
EXAMPLE_NOISES = 5
NAME_LETTERS, EXAMPLE_NAME_LETTERS = 5, 3


def draw(wanted: Wanted, rng: random.Random, units: int) -> Draft:
    """A sample with `units` lines of noise, after an example with variables of its own."""
    context, value, names = tracked(rng, EXAMPLE_NOISES, EXAMPLE_NAME_LETTERS)
    example = " ".join((ask(context, value), answer_prefix(value, len(names)), *names))
    context, value, names = tracked(rng, units, NAME_LETTERS)
    return Draft(
        f"{example}\n\n\n\n{ask(context, value)}", answer_prefix(value, len(names)), tuple(names), depth(context, names)
    )


def ask(context: str, value: str) -> str:
    """The question about a text."""
    return QUESTION.format(context=context, value=value)


def answer_prefix(value: str, count: int) -> str:
    """How the answer begins."""
    return PREFIX.format(count=count, value=value)


def depth(context: str, names: list[str]) -> float:
    """Where the chain begins."""
    return max(0, context.find(f"VAR {names[0]} =")) / len(context)


def tracked(rng: random.Random, n_noises: int, letters: int, hops: int = HOPS) -> tuple[str, str, list[str]]:
    """A text of noise with a chain in it, the chain's value, and its variables in order.

    Random numbers are drawn in the order in which lm-eval draws them.
    """
    names = ["".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(hops + 1)]
    while len(set(names)) < hops + 1:
        names = ["".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(hops + 1)]
    chain = [f"VAR {names[0]} = {rng.randint(10000, 99998)}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(hops)]
    sentences = [f"{NOISE}\n"] * n_noises
    if len(sentences) <= len(chain):
        sentences = [
            part + "." if part.strip() else part for part in (part for line in sentences for part in line.split("."))
        ]
    for i, place in enumerate(sorted(rng.sample(range(len(sentences)), len(chain)))):
        sentences.insert(place + i, chain[i])
    context = " ".join(sentences).replace(". \n", ".\n")
    return context, chain[0].split("=")[-1].strip(), names
