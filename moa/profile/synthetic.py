"""Synthetic calibration texts: recall over long distances in the demo's language, for any fast tokenizer."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moa.demo import language
from moa.errors import DataError
from moa.profile.chat import Chat
from moa.profile.data import TextSample
from moa.profile.wording import Wording

SYNTHETIC = "synthetic"
FIT_ATTEMPTS = 12
WORDS_PER_QUESTION, MOST_QUESTIONS = 64, 16
GOLDEN = (math.sqrt(5) - 1) / 2


def synthetic_samples(
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    count: int,
    seed: int,
    chat: Chat | None = None,
    *,
    shortest_tokens: int | None = None,
) -> tuple[TextSample, ...]:
    """Recall texts of exactly `n_tokens`, one-hop families in turn, what is asked for spread evenly over the text.

    With a chat template every question is a turn of the user and every answer one of the assistant. With
    `shortest_tokens` the texts' lengths are spread evenly from there to `n_tokens`.

    Raises:
        DataError: `n_tokens` is too short for a text with questions, or the tokenizer has too few words.
    """
    rng = random.Random(f"{seed}-{n_tokens}-calibration")
    writer = _Writer(chat or Chat(tokenizer), Wording.of(tokenizer))
    start, families = rng.random(), language.ONE_HOP
    room = n_tokens - (n_tokens if shortest_tokens is None else shortest_tokens)
    return tuple(
        # depths by the golden ratio, lengths by the root of two: each even for every number of texts
        _synthetic(
            writer,
            n_tokens - int(room * (i * math.sqrt(2) % 1)),
            families[i % len(families)],
            rng,
            (start + i // len(families) * GOLDEN) % 1,
        )
        for i in range(count)
    )


def _synthetic(
    writer: _Writer, n_tokens: int, family: language.Family, rng: random.Random, offset: float
) -> TextSample:
    """A text whose k questions ask for facts at the depths (i + offset) / k."""
    state = rng.getstate()

    def draw(n_words: int) -> language.Sample:
        rng.setstate(state)
        k = 1 if family == "single" else max(1, min(MOST_QUESTIONS, n_words // WORDS_PER_QUESTION))
        return language.recall_sample(rng, n_words, family, k, depths=[(i + offset) / k for i in range(k)])

    best: tuple[int, _Written] | None = None
    n_words = n_tokens
    for _ in range(FIT_ATTEMPTS):
        try:
            written = writer.write(draw(n_words))
        except ValueError:
            break
        excess = len(written.sample.token_ids) - n_tokens
        if 0 <= excess < len(written.filler) and (best is None or excess < best[0]):
            best = excess, written
        if 0 <= excess <= n_tokens // 128:
            break
        step = excess * n_words / len(written.sample.token_ids)
        n_words -= math.floor(step) if abs(step) >= 1 else int(math.copysign(1, step))
        n_words = min(n_words, 4 * n_tokens)  # a tokenizer that needs less than a token for four words is none
    if best is None:
        raise DataError(f"{n_tokens} tokens are too short for a recall text with this tokenizer; use longer --lengths")
    return best[1].without(best[0])


@dataclass(frozen=True, slots=True)
class _Written:
    """A text, and the tokens in it that belong to filler alone."""

    sample: TextSample
    filler: tuple[int, ...]

    def without(self, count: int) -> TextSample:
        """The text less `count` tokens of filler, from its middle."""
        first = (len(self.filler) - count) // 2
        gone = {*self.filler[first : first + count]}
        ids = tuple(token for i, token in enumerate(self.sample.token_ids) if i not in gone)
        dropped = sorted(gone)
        positions = tuple(p - bisect_left(dropped, p) for p in self.sample.answer_positions)
        return TextSample(ids, positions, self.sample.answer_ids)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes samples of the language for one tokenizer."""

    chat: Chat
    wording: Wording

    def write(self, sample: language.Sample) -> _Written:
        turns, places = self._turns(sample)
        text, contents = self.chat.write(turns, ask=False)
        word_at = [range(contents[turn].start + at.start, contents[turn].start + at.stop) for turn, at in places]
        ids, offsets = self.chat.encode(text)
        marks = [""] * len(text)
        for at, kind in zip(word_at, _kinds(sample), strict=True):
            marks[at.start : at.stop] = [kind] * len(at)
        kinds = [{*marks[begin:end]} for begin, end in offsets]
        positions = tuple(i for i, kind in enumerate(kinds) if "answer" in kind)
        filler = tuple(i for i, kind in enumerate(kinds) if "filler" in kind and kind <= {"filler", ""})
        return _Written(TextSample(tuple(ids), positions, tuple(ids[i] for i in positions)), filler)

    def _turns(self, sample: language.Sample) -> tuple[list[tuple[str, str]], list[tuple[int, range]]]:
        """Turns of user and assistant (one turn in all without a template), and each word's turn and characters in it."""
        if not self.chat.template:
            text, at = self.wording.write(sample.words[1:])
            return [("user", text)], [(0, place) for place in at]
        turns, places, start = list[tuple[str, str]](), list[tuple[int, range]](), 1
        for question in sample.questions:
            for role, stop in (("user", question.start), ("assistant", question.stop + 1)):
                text, at = self.wording.write(sample.words[start:stop])
                places += [(len(turns), place) for place in at]
                turns.append((role, text))
                start = stop
        return turns, places


def _kinds(sample: language.Sample) -> list[str]:
    """What each word after `<bos>` is for."""
    kinds = ["filler"] * sample.asked_at + ["question"] * (len(sample.words) - sample.asked_at)
    for fact in sample.facts:
        kinds[fact.start : fact.stop] = ["fact"] * len(fact)
    for question in sample.questions:
        kinds[question.start : question.stop] = ["answer"] * (question.stop - question.start)
    return kinds[1:]


def fit_words(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, draw: Callable[[int], language.Sample]
) -> tuple[language.Sample, TextSample] | None:
    """The text that `draw` makes of as many words as fit in `n_tokens`, also rendered; None where none fits.

    Args:
        draw: makes a text of a number of words, the same one each time, or raises ValueError where they are too few.
    """
    writer = _Writer(Chat(tokenizer), Wording.of(tokenizer))
    n_words = n_tokens
    for _ in range(FIT_ATTEMPTS):
        try:
            sample = draw(n_words)
        except ValueError:
            break
        rendered = writer.write(sample).sample
        if len(rendered.token_ids) <= n_tokens:
            return sample, rendered
        n_words = min(n_words - 1, int(n_words * n_tokens / len(rendered.token_ids)))
    return None
