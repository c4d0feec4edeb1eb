"""What a plan says beside its rules: the model it is for, what it costs, and where it comes from. Frozen and checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from moa.spans import MAX_TOKENS

Count = Annotated[int, Field(gt=0, lt=MAX_TOKENS)]
Size = Annotated[int, Field(ge=0, lt=MAX_TOKENS)]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

# FailFast: a file full of wrong entries must not become millions of error records.
Counts = Annotated[tuple[Count, ...], FailFast()]


class Record(BaseModel):
    """Base of a plan's records: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelShape(Record):
    """Which model a plan belongs to. `fingerprint` is "" where the plan was imported and nobody knows."""

    architecture: str
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    fingerprint: str = ""
    name: str = ""
    revision: str = ""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelShape:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class PlanLength(Record):
    """What the plan costs at one length."""

    length_tokens: Count
    density_ratio: Ratio
    kv_bytes_per_token: Ratio


class Budget(Record):
    """What a plan was asked to fit in where that was no density; see `moa.optimize.budget`.

    Every amount (bytes, GiB, milliseconds) is linear in the density: `free_amount` at none, `dense_amount` at 1.
    `basis` says what the conversion rests on.
    """

    kind: Literal["kv_bytes_per_token", "kv_gib", "decode_ms"]
    amount: Positive
    context_tokens: Count | None = None
    sequences: Count | None = None
    device: str = ""
    free_amount: Ratio
    dense_amount: Positive
    density_ratio: Ratio
    basis: str

    @property
    def option(self) -> str:
        """As it was asked for: `--kv-gib 4@131072x8`."""
        return self.option_for(f"{self.amount:g}")

    def option_for(self, amount: str) -> str:
        """The same option with another amount."""
        place = f"@{self.context_tokens}x{self.sequences}" if self.context_tokens else ""
        device = f" --device {self.device}" if self.device else ""
        return f"--{self.kind.replace('_', '-')} {amount}{place}{device}"

    def amount_at(self, density_ratio: float) -> float:
        """What a plan of this density needs."""
        return self.free_amount + density_ratio * (self.dense_amount - self.free_amount)


class Objective(Record):
    """What the optimizer minimised, under which budget, and what it could choose from.

    `elastic` says whether spans might grow with the length, `per_layer` whether a layer's KV heads had to share one rule.
    """

    predicted_loss: Finite
    density_budget_ratio: Ratio
    lengths_tokens: Counts
    max_rules_per_layer: Count | None = None
    budget: Budget | None = None
    elastic: bool = True
    per_layer: bool = False


class SolverRecord(Record):
    """What made the plan and how far from optimal it can be; a baseline minimised nothing and has no bound."""

    name: str
    status: str
    milp_status: str
    bound: Finite | None
    gap_ratio: Finite | None


class CalibrationLength(Record):
    """The texts of one length: how many there were of those wanted, the shortest, how many were cut and by how much."""

    length_tokens: Count
    samples: Count
    wanted_samples: Count
    shortest_tokens: Count | None = None
    truncated_samples: Size = 0
    truncated_tokens: Size = 0
    answer_tokens: Count


class Calibration(Record):
    """What the profile was measured on.

    `dataset` is a hub id, or of a file or folder the last part of its name, and `dataset_file_sha256` the file's digest.
    `chat_template_sha256` is "" where no template was applied. `mixed_lengths` says whether texts of one length have from
    half of it to all of it, `weighting` whether every answer "token" counts the same or every "text", and
    `influence_backends` who computed the influence; None, "" and () in older plans.
    """

    dataset: str
    dataset_sha256: str
    samples_per_length: Count
    lengths_tokens: Counts
    seed: int
    estimator: str
    supervision: str
    dataset_config: str = ""
    dataset_split: str = ""
    columns: str = ""
    chat_template_sha256: str = ""
    max_answer_tokens: Count | None = None
    rounds: Count = 1
    dataset_file_sha256: str = ""
    mixed_lengths: bool | None = None
    weighting: str = ""
    influence_backends: Annotated[tuple[str, ...], FailFast()] = ()
    lengths: Annotated[tuple[CalibrationLength, ...], FailFast()] = ()


class Validation(Record):
    """True loss of the chosen plan beside the dense model's, at a length that was not profiled."""

    length_tokens: Count
    samples: Count
    dense_loss: Finite
    sparse_loss: Finite
    candidates: Count


class CreatedBy(Record):
    """Versions that made the plan."""

    moa: str
    torch: str
    transformers: str
