"""What a paired evaluation finds: every sample's score under every way of running the model, and the differences.

A way of running is a `Variant`: dense, a plan, and whatever else joins them. Nothing here knows how scores were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from moa.eval.paired.statistics import paired_difference
from moa.eval.records import Count, Environment, Finite, PlanRef, Positive, Ratio, Record, wilson

PAIRED_VERSION: Final = 1
DENSE = "dense"
# How far apart KV bytes may lie that are called equal
EQUAL_BYTES_RATIO: Final = 0.02


class SampleScore(Record):
    """One sample's score.

    Args:
        doc_id: its number in the task.
        score: of one metric.
        prompt: first digits of the prompt's sha256, by which samples of two variants are known to be the same.
        depth_ratio: where in the text the evidence begins, where the task says it.
        truncated: the model saw less than the whole prompt.
    """

    doc_id: Count
    score: Finite
    prompt: str
    depth_ratio: Ratio | None = None
    truncated: bool = False


class TaskScores(Record):
    """One variant's scores in one task at one length: what reports, tables and pictures are made from.

    Args:
        length_tokens: of the task's texts; None where the task has no such thing.
        metric: as lm-eval calls it; "nll" is in nats per token.
        bounded: scores are shares between 0 and 1.
        samples: in order of `doc_id`.
    """

    variant: str
    task: str
    length_tokens: Positive | None
    metric: str
    higher_is_better: bool
    bounded: bool
    samples: Annotated[tuple[SampleScore, ...], Field(min_length=1)]

    @property
    def cell(self) -> tuple[str, int | None, str]:
        """What is compared between variants: task, length and metric."""
        return self.task, self.length_tokens, self.metric

    @property
    def mean(self) -> float:
        """Mean score."""
        return math.fsum(sample.score for sample in self.samples) / len(self.samples)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of a mean share."""
        if not self.bounded:
            return None
        return wilson(math.fsum(sample.score for sample in self.samples), len(self.samples))

    @property
    def truncated(self) -> int:
        """Samples that were cut."""
        return sum(sample.truncated for sample in self.samples)


class KvSize(Record):
    """KV bytes of one sequence of `length_tokens`, beside those of the dense model, in the dtype that was evaluated."""

    length_tokens: Positive
    kv_bytes: Positive
    dense_kv_bytes: Positive

    @property
    def ratio(self) -> float:
        """KV bytes over dense ones."""
        return self.kv_bytes / self.dense_kv_bytes


class Variant(Record):
    """One way of running the model.

    Args:
        name: "dense", or what it was called.
        attention: what computed attention.
        plan: of a plan, its digest and what it keeps.
        settings: of any other method, as they were.
        kv: what is attended to at each evaluated length; () of a way that does not say, and of older reports.
        saves_memory: false where keys are only hidden, so that memory holds the dense bytes: accuracy only.
        equal_to: the variant whose KV bytes this one was made to have; "" for none.
        results_file: lm-eval's own results, beside this report.
    """

    name: str
    attention: str
    plan: PlanRef | None = None
    settings: dict[str, str] = Field(default_factory=dict)
    kv: tuple[KvSize, ...] = ()
    saves_memory: bool = True
    equal_to: str = ""
    results_file: str = ""

    def kv_at(self, length_tokens: int | None) -> KvSize | None:
        """KV bytes at one of the evaluated lengths; None at any other."""
        return next((size for size in self.kv if size.length_tokens == length_tokens), None)


class TaskInfo(Record):
    """Which task, as lm-eval has it: its version, the hash of its samples, and how many it has and were used."""

    name: str
    version: str
    samples_hash: str
    samples_original: Count
    samples_used: Count


class EvalConditions(Record):
    """What all numbers of a paired evaluation have in common.

    Args:
        model_revision, model_commit: what was asked for on the hub, and what came.
        chat_template, chat_template_sha256: the template that was applied, and its digest; "" for none.
        truncation_side: where prompts that do not fit are cut.
        max_length_tokens: room for prompt and answer: the longest length, the longest answer and the template.
        context_tokens: what the model says it can take.
        beyond_context_tokens: how much further the evaluation went.
        prefill_chunk_tokens: of a prompt that generation computed at a time, dense and under plans; None for all at once.
        data_seed, num_samples: of the made-up tasks; `seeds` are lm-eval's.
        options: files of the user's that tasks took, by their last names.
        versions: of the libraries that decide numbers.
        smoke_test: samples were left out with --limit, so no number counts.
        processes: that shared the work.
    """

    model_name: str
    model_fingerprint: str
    model_revision: str
    model_commit: str
    architecture: str
    parameters: Positive
    tokenizer_sha256: str
    environment: Environment
    versions: dict[str, str]
    chat_template: str = ""
    chat_template_sha256: str
    truncation_side: Literal["left"] = "left"
    lengths_tokens: tuple[Positive, ...]
    max_length_tokens: Positive
    context_tokens: Positive | None
    beyond_context_tokens: Count
    template_tokens: Count
    batch_size: str
    prefill_chunk_tokens: Positive | None = None
    num_samples: Positive
    data_seed: Count
    seeds: dict[str, int]
    limit: float | None
    smoke_test: bool
    options: dict[str, str]
    processes: Positive
    date: str
    command: str
    time_s: Annotated[float, Field(ge=0)]


class Difference(Record):
    """A variant beside dense on the same samples; see `PairedDifference`. The interval is None with one sample only."""

    variant: str
    task: str
    length_tokens: Positive | None
    metric: str
    samples: Positive
    unpaired: Count
    dense: Finite
    mean: Finite
    difference: Finite
    low: Finite | None
    high: Finite | None
    interval: str
    p_value: Ratio | None
    better: Count
    worse: Count

    @classmethod
    def of(cls, ours: TaskScores, dense: TaskScores) -> Self | None:
        """The difference over the samples that both have; None where they share none."""
        theirs = {(sample.doc_id, sample.prompt): sample.score for sample in dense.samples}
        pairs = [
            (sample.score, theirs[sample.doc_id, sample.prompt])
            for sample in ours.samples
            if (sample.doc_id, sample.prompt) in theirs
        ]
        if not pairs:
            return None
        a, b = zip(*pairs, strict=True)
        found = paired_difference(a, b, bounded=ours.bounded and dense.bounded)
        sign = 1 if ours.higher_is_better else -1
        return cls(
            variant=ours.variant,
            task=ours.task,
            length_tokens=ours.length_tokens,
            metric=ours.metric,
            samples=len(pairs),
            unpaired=len(ours.samples) + len(dense.samples) - 2 * len(pairs),
            dense=math.fsum(b) / len(b),
            mean=math.fsum(a) / len(a),
            difference=found.value,
            low=found.low if math.isfinite(found.low) else None,
            high=found.high if math.isfinite(found.high) else None,
            interval=found.interval,
            p_value=found.p_value,
            better=found.better if sign > 0 else found.worse,
            worse=found.worse if sign > 0 else found.better,
        )


class PairedReport(Record):
    """Variants of one model on the same tasks; the first is dense."""

    schema_version: Literal[1] = PAIRED_VERSION
    conditions: EvalConditions
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    tasks: tuple[TaskInfo, ...]
    scores: tuple[TaskScores, ...]

    @model_validator(mode="after")
    def _check(self) -> PairedReport:
        names = [variant.name for variant in self.variants]
        if len({*names}) != len(names):
            raise ValueError(f"two variants of one name: {names}")
        if {found.variant for found in self.scores} - {*names}:
            raise ValueError("scores of a variant that is not among the variants")
        if {variant.equal_to for variant in self.variants} - {"", *names}:
            raise ValueError("a variant is compared at the bytes of one that is not among the variants")
        return self

    @property
    def cells(self) -> tuple[tuple[str, int | None, str], ...]:
        """Every task, length and metric that any variant has."""
        return tuple(dict.fromkeys(found.cell for found in self.scores))

    def at(self, variant: str, cell: tuple[str, int | None, str]) -> TaskScores | None:
        """A variant's scores in one cell."""
        return next((found for found in self.scores if found.variant == variant and found.cell == cell), None)

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Every other variant beside dense, cell by cell; computed from the samples, never kept apart from them."""
        return tuple(self._differences())

    @property
    def truncated(self) -> int:
        """Samples that were cut, under any variant."""
        return sum(found.truncated for found in self.scores)

    @property
    def unpaired(self) -> int:
        """Samples without a partner: of dense alone where there is no other variant."""
        if len(self.variants) == 1:
            return sum(len(found.samples) for found in self.scores)
        shared = {(d.variant, d.task, d.length_tokens, d.metric): d for d in self.differences}
        return sum(
            d.unpaired if (d := shared.get((variant.name, *cell))) else self._lone(variant.name, cell)
            for variant in self.variants[1:]
            for cell in self.cells
        )

    def problems(self) -> tuple[str, ...]:
        """What keeps the numbers from being what they seem; `--strict` fails on any."""
        c = self.conditions
        found = {
            f"{self.truncated} samples were truncated to {c.max_length_tokens} tokens": self.truncated,
            "unpaired: there is no plan beside the dense model": len(self.variants) == 1,
            f"{self.unpaired} samples have no partner with the same prompt": len(self.variants) > 1 and self.unpaired,
            f"texts go {c.beyond_context_tokens} tokens beyond the model's {c.context_tokens}": c.beyond_context_tokens,
            "smoke test: --limit leaves out samples, no number counts": c.smoke_test,
        }
        return (*(problem for problem, there in found.items() if there), *self._unequal())

    def _unequal(self) -> Iterator[str]:
        """Variants that have not the KV bytes they were made to have."""
        for variant in self.variants:
            others = next((other.kv for other in self.variants if other.name == variant.equal_to), ())
            for size, other in ((size, other) for other in others if (size := variant.kv_at(other.length_tokens))):
                apart = size.kv_bytes / other.kv_bytes - 1
                if abs(apart) > EQUAL_BYTES_RATIO:
                    yield (
                        f"{variant.name} is not at equal KV bytes: {apart:+.1%} beside {variant.equal_to} "
                        f"at {size.length_tokens} tokens"
                    )

    def _differences(self) -> Iterator[Difference]:
        for variant in self.variants[1:]:
            for cell in self.cells:
                ours, dense = self.at(variant.name, cell), self.at(self.variants[0].name, cell)
                found = Difference.of(ours, dense) if ours and dense else None
                if found is not None:
                    yield found

    def _lone(self, variant: str, cell: tuple[str, int | None, str]) -> int:
        sides = (self.at(variant, cell), self.at(self.variants[0].name, cell))
        return sum(len(side.samples) for side in sides if side)
