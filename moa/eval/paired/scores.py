"""Scores out of the samples that lm-eval logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moa.eval.paired.records import SampleScore, TaskScores

Logged = Mapping[str, Any]
PROMPT_DIGITS = 16
SCORE, NLL = "score", "nll"
# Metrics that say the same as the one that is kept
TWINS = ("perplexity", "byte_perplexity", "bits_per_byte")


def task_scores(
    variant: str,
    samples: Mapping[str, Sequence[Logged]],
    higher_is_better: Mapping[str, Mapping[str, bool]],
    was_cut: Callable[[Sequence[Any]], bool],
) -> tuple[TaskScores, ...]:
    """Every task's scores, by length and metric.

    Args:
        variant: whose they are.
        samples: as lm-eval logs them, by task.
        higher_is_better: by task and metric.
        was_cut: whether the model saw less than all of a request.
    """
    cells: dict[tuple[str, int | None, str], list[SampleScore]] = {}
    for task, logged in samples.items():
        for sample in logged:
            cut = any(was_cut(request) for request in sample["arguments"])
            for metric, value in _values(sample):
                length = _length(sample["doc"])
                cells.setdefault((task, length, metric), []).append(_score(sample, value, cut))
    return tuple(
        TaskScores(
            variant=variant,
            task=task,
            length_tokens=length,
            metric=metric,
            higher_is_better=(up := _higher_is_better(metric, higher_is_better.get(task, {}))),
            bounded=up and all(0 <= each.score <= 1 for each in found),
            samples=tuple(sorted(found, key=lambda each: each.doc_id)),
        )
        for (task, length, metric), found in cells.items()
    )


def _score(sample: Logged, value: float, cut: bool) -> SampleScore:
    depth = sample["doc"].get("depth_ratio") if isinstance(sample["doc"], Mapping) else None
    return SampleScore(
        doc_id=sample["doc_id"],
        score=value,
        prompt=sample["prompt_hash"][:PROMPT_DIGITS],
        depth_ratio=None if depth is None else float(depth),
        truncated=cut,
    )


def _values(sample: Logged) -> Iterator[tuple[str, float]]:
    """A sample's metrics that are one number; RULER's and ours at a length are called the score at that length."""
    length = _length(sample["doc"])
    names = [str(name) for name in sample["metrics"]]
    at_length = str(length) in names
    suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
    for name in names:
        value = sample[name]
        if at_length and (name.isdecimal() or name in TWINS or name == SCORE):
            if name == str(length) and NLL not in names:
                yield SCORE + suffix, float(value)
        elif name == "word_perplexity":
            yield f"word_{NLL}{suffix}", -float(value[0]) / float(value[1])  # likelihood and words
        elif name == "perplexity":
            yield NLL + suffix, -float(value)  # each sample's is a log-likelihood
        elif isinstance(value, bool | int | float):
            yield name + suffix, float(value)


def _higher_is_better(metric: str, told: Mapping[str, bool]) -> bool:
    name = metric.split(",")[0]
    return not name.endswith(NLL) and told.get(name, True)


def _length(doc: Any) -> int | None:
    length = doc.get("max_length") if isinstance(doc, Mapping) else None
    return length if isinstance(length, int) else None
