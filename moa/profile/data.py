"""Calibration texts: token ids with the positions of the answers whose loss counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from moa.errors import DataError


@dataclass(frozen=True, slots=True)
class TextSample:
    """One text of N tokens; `answer_ids[i]` is the token wanted at `answer_positions[i]`, each position >= 1."""

    token_ids: tuple[int, ...]
    answer_positions: tuple[int, ...]
    answer_ids: tuple[int, ...]
    truncated_tokens: int = 0


def digest(samples: Sequence[TextSample]) -> str:
    """SHA-256 of the samples' tokens and answers."""
    text = json.dumps([[s.token_ids, s.answer_positions, s.answer_ids] for s in samples])
    return hashlib.sha256(text.encode()).hexdigest()


def require_answers(samples: Sequence[TextSample], source: str) -> tuple[TextSample, ...]:
    """The samples, each of which must bring its answer.

    Raises:
        DataError: one does not.
    """
    lacking = sum(not sample.answer_positions for sample in samples)
    if lacking:
        raise DataError(
            f"{source}: {lacking} of {len(samples)} samples have no 'answer', which --supervision reference needs; "
            "add answers, or let the model write them with --supervision model"
        )
    return tuple(samples)


def samples_from(content: object) -> tuple[TextSample, ...]:
    """Samples from the JSON form that `dataclasses.asdict` gives."""
    if not isinstance(content, list) or not content:
        raise ValueError("wanted a list of samples")
    return tuple(
        TextSample(
            tuple(row["token_ids"]), tuple(row["answer_positions"]), tuple(row["answer_ids"]), row["truncated_tokens"]
        )
        for row in content
    )
