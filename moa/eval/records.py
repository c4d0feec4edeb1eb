"""What an evaluation finds, as frozen records that survive JSON: every number with the conditions it was taken under."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, median
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moa.demo.language import FAMILIES, Family
from moa.plan import Plan, PlanLength

REPORT_VERSION: Final = 1
DENSE = "dense"
# Two-sided 95 %.
Z = NormalDist().inv_cdf(0.975)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Record(BaseModel):
    """Base of all records: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def wilson(right: float, questions: int) -> tuple[float, float]:
    """The Wilson 95 % interval of a share; (0, 1) of no questions.

    With scores between 0 and 1 added up in place of right answers it is wider than needed, never narrower.
    It takes questions for independent. Those packed into one text are not quite, so true intervals are a little wider.
    """
    if not questions:
        return 0.0, 1.0
    share, weight = right / questions, Z * Z / questions
    middle = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / questions + weight / (4 * questions)) / (1 + weight)
    # the ends are exactly 0 and 1 where no answer, or every answer, was right; rounding must not say otherwise
    return (0.0 if right == 0 else max(0.0, middle - half)), (1.0 if right == questions else min(1.0, middle + half))


class Score(Record):
    """Right answers of some questions.

    Args:
        questions, right: how many were asked and answered right in full.
        accuracy_ratio: right / questions.
        low_ratio, high_ratio: Wilson 95 % interval of the accuracy.
        answer_tokens: tokens of all answers.
        answer_nll: mean negative log-likelihood per answer token, in nats.
    """

    questions: Positive
    right: Count
    accuracy_ratio: Ratio
    low_ratio: Ratio
    high_ratio: Ratio
    answer_tokens: Positive
    answer_nll: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @classmethod
    def of(cls, right: int, questions: int, nll_sum: float, answer_tokens: int) -> Self:
        """The score of counted answers; `nll_sum` in nats over all answer tokens."""
        low, high = wilson(right, questions)
        return cls(
            questions=questions,
            right=right,
            accuracy_ratio=right / questions,
            low_ratio=low,
            high_ratio=high,
            answer_tokens=answer_tokens,
            answer_nll=max(0.0, nll_sum / answer_tokens),
        )

    @model_validator(mode="after")
    def _check(self) -> Score:
        if self.right > self.questions:
            raise ValueError(f"{self.right} right answers of {self.questions} questions")
        return self

    @property
    def answer_perplexity(self) -> float:
        """exp of the mean negative log-likelihood per answer token."""
        return math.exp(min(self.answer_nll, 700.0))  # above, a float overflows


class FamilyScore(Record):
    """The score of one family of questions."""

    family: Family
    score: Score


class DepthScore(Record):
    """The score of questions whose fact begins in a share `[from_ratio, to_ratio)` of the text."""

    from_ratio: Ratio
    to_ratio: Ratio
    score: Score


class RecallTask(Record):
    """Which recall questions are asked; the same task and seed ask the same questions of every model with one tokenizer.

    Args:
        families: of `moa.demo.language`.
        texts_per_family: texts of each family; `single`, with one question a text, has `single_texts`.
        questions_per_text: at most; short texts have one per 64 words.
        depth_buckets: equal parts of the text by which depths are told apart.
        seed: of the texts. The stream's name is mixed in, so no seed meets a training or calibration text.
    """

    families: Annotated[tuple[Family, ...], Field(min_length=1)] = FAMILIES
    texts_per_family: Positive = 2
    single_texts: Positive = 6
    questions_per_text: Positive = 24
    depth_buckets: Positive = 5
    seed: int = 0

    @property
    def forwards_per_length(self) -> int:
        """Texts, and so model calls, per length."""
        return sum(
            self.single_texts if family == "single" else self.texts_per_family
            for family in dict.fromkeys(self.families)
        )


class RecallAtLength(Record):
    """Recall at one length: all questions together, by family, and by depth (empty depths left out)."""

    length_tokens: Positive
    texts: Positive
    overall: Score
    families: tuple[FamilyScore, ...]
    depths: tuple[DepthScore, ...]


class Perplexity(Record):
    """Perplexity of the last `scored_tokens` tokens of each text; `nll` is their mean in nats."""

    length_tokens: Positive
    texts: Positive
    scored_tokens: Positive
    seed: int
    nll: Finite

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return math.exp(min(self.nll, 700.0))


class Environment(Record):
    """Where numbers were measured."""

    device: str
    dtype: str
    threads: Positive
    moa: str
    torch: str
    transformers: str
    python: str


class Conditions(Record):
    """What all numbers of a report have in common. `date` is UTC in ISO form; `command` as it was typed, without places."""

    model_name: str
    model_fingerprint: str
    architecture: str
    parameters: Positive
    environment: Environment
    task: RecallTask | None
    lengths_tokens: tuple[Positive, ...]
    date: str
    command: str


class PlanRef(Record):
    """Which plan a number belongs to, and what the plan keeps at the evaluated lengths (computed from its spans)."""

    sha256: str
    distinct_rules: Positive
    lengths: tuple[PlanLength, ...]

    @classmethod
    def of(cls, plan: Plan, lengths_tokens: Sequence[int]) -> Self:
        """The reference to `plan` with its cost at each length."""
        lengths = tuple(plan.at_length(n) for n in lengths_tokens)
        return cls(sha256=plan.sha256, distinct_rules=plan.distinct_rules, lengths=lengths)

    def density_ratio(self, length_tokens: int) -> float | None:
        """Density at one of its lengths, None at any other."""
        return next((at.density_ratio for at in self.lengths if at.length_tokens == length_tokens), None)


class MethodResult(Record):
    """What one way of running the model found; `plan` is None for the dense model.

    Args:
        method: "dense", "uniform", "moa-estimator", "joint", or any other name.
        density_budget_ratio: the budget the plan was made for.
        backend: attention that ran: a backend of moa, or transformers' own for dense.
    """

    method: str
    density_budget_ratio: Ratio | None = None
    plan: PlanRef | None = None
    backend: str
    recall: tuple[RecallAtLength, ...] = ()
    perplexity: tuple[Perplexity, ...] = ()

    def recall_at(self, length_tokens: int) -> RecallAtLength | None:
        """Recall at one length, None where it was not measured."""
        return next((r for r in self.recall if r.length_tokens == length_tokens), None)

    def perplexity_at(self, length_tokens: int) -> Perplexity | None:
        """Perplexity at one length, None where it was not measured."""
        return next((p for p in self.perplexity if p.length_tokens == length_tokens), None)


class Spread(Record):
    """Median, least and greatest of repeated measurements."""

    median: Seconds
    minimum: Seconds
    maximum: Seconds

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of at least one value."""
        return cls(median=float(median(values)), minimum=float(min(values)), maximum=float(max(values)))


class SideSpeed(Record):
    """Dense or sparse side of a measurement; `kv_bytes` are allocated bytes after the last token, measured."""

    attention: str
    prefill_s: Spread
    decode_tokens_per_s: Spread
    kv_bytes: Positive


class Speed(Record):
    """Dense beside one plan, interleaved in one run: `prompt_tokens` prefilled, then decoded up to `length_tokens`."""

    plan_sha256: str
    density_ratio: Ratio
    length_tokens: Positive
    prompt_tokens: Positive
    decode_tokens: Positive
    rounds: Positive
    seed: int
    environment: Environment
    dense: SideSpeed
    sparse: SideSpeed

    @property
    def prefill_speedup_ratio(self) -> float:
        """Dense prefill time over the plan's, medians."""
        return self.dense.prefill_s.median / self.sparse.prefill_s.median

    @property
    def decode_speedup_ratio(self) -> float:
        """The plan's decode tokens/s over dense ones, medians."""
        return self.sparse.decode_tokens_per_s.median / self.dense.decode_tokens_per_s.median

    @property
    def kv_bytes_ratio(self) -> float:
        """The plan's KV bytes over dense ones."""
        return self.sparse.kv_bytes / self.dense.kv_bytes


class LossAt(Record):
    """Predicted loss at one length."""

    length_tokens: Positive
    loss: Finite


class ParetoPoint(Record):
    """One assignment the optimizer found; `validation_loss` is the true loss where it was measured."""

    label: str = ""
    density_ratio: Ratio
    losses: Annotated[tuple[LossAt, ...], Field(min_length=1)]
    chosen: bool = False
    validation_loss: Finite | None = None


class Report(Record):
    """One evaluation: the dense model beside any number of plans, under one set of conditions."""

    schema_version: Literal[1] = REPORT_VERSION
    title: str
    conditions: Conditions
    dense: MethodResult
    methods: tuple[MethodResult, ...]
    speed: tuple[Speed, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()

    @property
    def results(self) -> tuple[MethodResult, ...]:
        """Dense first, then every method."""
        return (self.dense, *self.methods)

    @property
    def recall_lengths_tokens(self) -> tuple[int, ...]:
        """Every length at which any recall was measured, ascending."""
        return tuple(sorted({r.length_tokens for result in self.results for r in result.recall}))
