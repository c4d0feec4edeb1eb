"""Rows of a data set as calibration texts of a length: tokenised, and cut where they do not fit."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from moa.errors import DataError
from moa.profile.data import TextSample
from moa.profile.supervise import GENERATED_ANSWER_TOKENS


def file_samples(
    rows: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    count: int,
    seed: int,
    source: str,
) -> tuple[TextSample, ...]:
    """Up to `count` rows for one length, seeded: longer than half of it, prompts cut on the left where they do not fit.

    What a prompt begins with by the tokenizer's own rules (such as `<bos>`) stays.

    Raises:
        DataError: no row is long enough.
    """
    order = random.Random(f"{seed}-{n_tokens}").sample(range(len(rows)), len(rows))
    samples = [s for i in order if _fits(s := _tokenize(rows[i], tokenizer, n_tokens), n_tokens)]
    if not samples:
        raise DataError(
            f"{source}: no sample is longer than {n_tokens // 2} tokens with an answer that leaves room for its prompt, "
            f"so none can calibrate length {n_tokens}; use shorter --lengths or longer texts"
        )
    return tuple(samples[:count])


def _fits(sample: TextSample, n_tokens: int) -> bool:
    length = len(sample.token_ids) + (0 if sample.answer_positions else GENERATED_ANSWER_TOKENS)
    return n_tokens // 2 < length <= n_tokens and len(sample.token_ids) > len(sample.answer_positions)


def _tokenize(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> TextSample:
    prompt = list(tokenizer(row["prompt"], verbose=False)["input_ids"])
    answer = list(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) if "answer" in row else []
    room = n_tokens - (len(answer) or GENERATED_ANSWER_TOKENS)
    cut = max(0, len(prompt) - max(1, room))
    kept = 1 if cut and prompt[0] == tokenizer.bos_token_id else 0
    prompt = prompt[:kept] + prompt[cut + kept :]
    positions = range(len(prompt), len(prompt) + len(answer))
    return TextSample((*prompt, *answer), tuple(positions), tuple(answer), cut)
