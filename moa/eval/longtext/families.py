"""All families of long-context questions, by name."""

from __future__ import annotations

from functools import partial

from moa.demo.language import FAMILIES as DEMO_FAMILIES
from moa.errors import UsageError, closest
from moa.eval.longtext import common_words, frequent_words, niah, plain, questions, recall, variables
from moa.eval.longtext.demo_recall import DemoRecall
from moa.eval.longtext.draft import Draw, Family
from moa.eval.longtext.niah import Needles
from moa.eval.longtext.sized import Sized

PREFIX = "moa_"
# RULER's thirteen: its table 5
NEEDLES = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", n_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", n_values=4),
    "niah_multiquery": Needles("essay", n_queries=4),
}
# Fewer words of prose leave needles no 40 places of their own
LEAST_PROSE = 8


def _sized(name: str, version: int, draw: Draw, answer_tokens: int, least_units: int = 1) -> Family:
    return Family(name, version, Sized(draw, answer_tokens, least_units), answer_tokens)


def _needles(name: str, needles: Needles) -> Family:
    least = max(LEAST_PROSE, needles.count) if needles.haystack == "essay" else needles.count
    return _sized(name, 1, partial(niah.draw, needles), 128, least)


_ALL = (
    *(_needles(name, needles) for name, needles in NEEDLES.items()),
    _sized("vt", 1, variables.draw, 30),
    _sized("cwe", 1, common_words.draw, 120, common_words.COMMON + 1),
    _sized("fwe", 1, frequent_words.draw, 50, frequent_words.LEAST_WORDS),
    _sized("qa_1", 1, partial(questions.draw, 1), 32, 1),
    _sized("qa_2", 1, partial(questions.draw, 2), 32, 2),
    _sized("passkey", 1, recall.passkey, 16),
    _sized("kv", 1, recall.key_value, 64),
    Family("perplexity", 1, plain.english, 0),
    *(Family(f"demo_{family}", 1, DemoRecall(family), 0) for family in DEMO_FAMILIES),
    Family("demo_perplexity", 1, plain.demo, 0),
)
FAMILIES = {family.name: family for family in _ALL}


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in FAMILIES:
        raise UsageError(f"no family of questions {name!r}{closest(name, FAMILIES)}")
    return FAMILIES[name]
