"""A turn of the scheduler laid out as one row of tokens, and what is wanted of its logits."""

from __future__ import annotations

from dataclasses import dataclass, field

from moa.kernels.batch import Batch
from moa.runner.policies import Turn
from moa.runner.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of a prompt whose log-probabilities are wanted: `tokens` follow those at the row's wanted places."""

    sequence: Sequence
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Layout:
    """One row.

    Args:
        tokens: ids, [T].
        positions: of each in its sequence, [T].
        batch: which tokens belong to whom.
        sampled: requests that get a token; their last places come first in `wanted`.
        scored: prompts whose tokens are scored; their places follow.
        wanted: places in the row whose logits are wanted.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    batch: Batch = field(default_factory=lambda: Batch(()))
    sampled: list[Sequence] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)


def lay_out(turn: Turn) -> Layout:
    """The row of a turn: requests in the order in which they were chosen."""
    tokens: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    sampled: list[Sequence] = []
    scored: list[Scored] = []
    scored_places: list[int] = []
    parts: list[tuple[int, int, int]] = []
    for sequence, count in turn.parts:
        if not isinstance(sequence, Sequence):
            raise TypeError(f"wanted a request of the engine, got {type(sequence).__name__}")
        first, end = sequence.computed_tokens, sequence.computed_tokens + count
        if score := _to_score(sequence, first, end):
            at = len(tokens) - first
            scored.append(Scored(sequence, sequence.tokens[score.start + 1 : score.stop + 1]))
            scored_places += [at + position for position in score]
        tokens += sequence.tokens[first:end]
        positions += range(first, end)
        parts.append((sequence.order, count, first))
        if end == sequence.known_tokens:
            sampled.append(sequence)
            places.append(len(tokens) - 1)
    return Layout(tokens, positions, Batch.pack(parts), sampled, scored, places + scored_places)


def _to_score(sequence: Sequence, first: int, end: int) -> range:
    """Positions of a chunk whose next token belongs to the prompt and has no log-probability yet."""
    request = sequence.request
    if request.sampling.prompt_logprobs is None:
        return range(0)
    return range(max(first, len(sequence.prompt_logprobs)), min(end, len(request.prompt) - 1))
