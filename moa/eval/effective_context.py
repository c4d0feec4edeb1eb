"""The effective context length: how long a text may get while recall stays at a level, from recall at some lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moa.eval.records import wilson

RECALL_LEVEL = 0.9  # MoA's (arXiv 2406.14909)


@dataclass(frozen=True, slots=True)
class ContextRow:
    """Recall under one plan at one length.

    Args:
        experiment, method, seed: what was asked; no seed where nothing was calibrated.
        budget: tokens of span on average, or a density; None for the dense model.
        longest_profiled: tokens; None where nothing was profiled.
        mean_span_tokens: of the plan at this length, mean over layers and KV heads; the length itself when dense.
        low_ratio, high_ratio: Wilson 95 % interval.
        plan: the start of its digest.
    """

    experiment: str
    method: str
    seed: int | None
    budget: float | None
    longest_profiled: int | None
    length_tokens: int
    mean_span_tokens: float
    questions: int
    right: int
    accuracy_ratio: float
    low_ratio: float
    high_ratio: float
    plan: str


@dataclass(frozen=True, slots=True)
class Effective:
    """How long texts may get: the longest length up to which recall stays at the level, and the first where it does not.

    `sure_tokens` and `surely_lost_tokens` are the same with the whole 95 % interval above the level, or below it.
    """

    tokens: int
    lost_tokens: int | None
    sure_tokens: int
    surely_lost_tokens: int | None


def effective_context(rows: Iterable[ContextRow], level: float = RECALL_LEVEL) -> Effective:
    """From rows of one method, any order; the lengths measured are all that is known."""
    ordered = sorted(rows, key=lambda row: row.length_tokens)
    longest, lost = _until([(row.length_tokens, row.accuracy_ratio < level) for row in ordered])
    sure, _ = _until([(row.length_tokens, row.low_ratio < level) for row in ordered])
    _, surely_lost = _until([(row.length_tokens, row.high_ratio < level) for row in ordered])
    return Effective(longest, lost, sure, surely_lost)


def _until(found: Sequence[tuple[int, bool]]) -> tuple[int, int | None]:
    """The last length before the first that is lost (0 if there is none before), and that one (None if none is lost)."""
    kept = 0
    for length, lost in found:
        if lost:
            return kept, length
        kept = length
    return kept, None


def over_seeds(rows: Sequence[ContextRow]) -> tuple[float, float, float]:
    """Mean recall of one cell over calibration seeds, and the Wilson interval of that share of one seed's questions.

    All seeds are asked the same questions, so these are counted once.
    """
    questions = rows[0].questions
    mean = sum(row.right for row in rows) / len(rows)
    return (mean / questions, *wilson(mean, questions))
