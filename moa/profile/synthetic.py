"""Synthetic calibration texts: recall over long distances in the demo's language, for any fast tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from moa.demo import language
from moa.errors import DataError
from moa.profile.data import TextSample

SYNTHETIC = "synthetic"
FIT_ATTEMPTS = 12


def synthetic_samples(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, count: int, seed: int
) -> tuple[TextSample, ...]:
    """Recall texts in the demo's language for any fast tokenizer, of `n_tokens` or just below, one-hop families in turn.

    Raises:
        DataError: `n_tokens` is too short for a text with questions.
    """
    rng = random.Random(f"{seed}-{n_tokens}-calibration")
    return tuple(
        _synthetic(tokenizer, n_tokens, language.ONE_HOP[i % len(language.ONE_HOP)], rng) for i in range(count)
    )


def _synthetic(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, family: language.Family, rng: random.Random
) -> TextSample:
    state = rng.getstate()

    def draw(n_words: int) -> language.Sample:
        rng.setstate(state)
        return language.recall_sample(rng, n_words, family, 1 if family == "single" else max(1, min(16, n_words // 64)))

    fitted = fit_words(tokenizer, n_tokens, draw)
    if fitted is None:
        raise DataError(f"{n_tokens} tokens are too short for a recall text with this tokenizer; use longer --lengths")
    return fitted[1]


def fit_words(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, draw: Callable[[int], language.Sample]
) -> tuple[language.Sample, TextSample] | None:
    """The text that `draw` makes of as many words as fit in `n_tokens`, also rendered; None where none fits.

    Args:
        draw: makes a text of a number of words, the same one each time, or raises ValueError where they are too few.
    """
    n_words = n_tokens
    for _ in range(FIT_ATTEMPTS):
        try:
            sample = draw(n_words)
        except ValueError:
            break
        rendered = render(tokenizer, sample)
        if len(rendered.token_ids) <= n_tokens:
            return sample, rendered
        n_words = min(n_words - 1, int(n_words * n_tokens / len(rendered.token_ids)))
    return None


def render(tokenizer: PreTrainedTokenizerBase, sample: language.Sample) -> TextSample:
    """Tokenise a text of the demo's language; the words' places are found by character offsets."""
    words = [word for word in sample.words if word != "<bos>"]
    shift = len(sample.words) - len(words)
    starts, at = [], 0
    for word in words:
        starts.append(at)
        at += len(word) + 1
    encoded = tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False)
    answers = [range(q.start - shift, q.stop - shift) for q in sample.questions]
    spans = [(starts[r.start], starts[r.stop - 1] + len(words[r.stop - 1])) for r in answers]
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    positions = [
        i
        for i, (begin, end) in enumerate(offsets)
        if end > begin and any(begin < stop and end > start for start, stop in spans)
    ]
    return TextSample(tuple(ids), tuple(positions), tuple(ids[i] for i in positions))
