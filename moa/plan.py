"""The plan: which span each KV head gets. Pure data, as one JSON file.

Loading never executes anything, and a file too large for any plan is refused unread, so what it allocates is bounded.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import FailFast, Field, ValidationError, model_validator

from moa import hub_files
from moa.errors import PlanError
from moa.files import write_atomic
from moa.plan_reading import MAX_PLAN_BYTES, explain, parse_json, read_limited
from moa.plan_records import (
    Budget,
    Calibration,
    CalibrationLength,
    Count,
    CreatedBy,
    ModelShape,
    Objective,
    PlanLength,
    Record,
    Size,
    SolverRecord,
    Validation,
)
from moa.spans import MAX_TOKENS, ElasticRule, LengthMode, SpanRules

# The records that a plan is made of, and how it is read, are to be had here as well.
__all__ = [
    "ELEMENT_BYTES",
    "LATER_FIELDS",
    "MAX_PLAN_BYTES",
    "PLAN_NAME",
    "SCHEMA_VERSION",
    "Budget",
    "Calibration",
    "CalibrationLength",
    "CreatedBy",
    "ModelShape",
    "Objective",
    "Plan",
    "PlanLength",
    "SolverRecord",
    "Validation",
    "explain",
    "load_plan",
    "parse_json",
    "read_limited",
]

SCHEMA_VERSION: Final = 1
PLAN_NAME = "plan.json"
# Fields that came after the first release: while they have their defaults they are no part of the digest, so that the
# digests of older plans hold.
LATER_FIELDS: Final = {
    "calibration": (
        "dataset_config",
        "dataset_split",
        "columns",
        "chat_template_sha256",
        "max_answer_tokens",
        "rounds",
        "dataset_file_sha256",
        "mixed_lengths",
        "weighting",
        "influence_backends",
        "lengths",
    ),
    "objective": ("budget", "elastic", "per_layer"),
}
ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

Alpha = Annotated[int, Field(gt=-MAX_TOKENS, lt=MAX_TOKENS)]
Beta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# FailFast: a file full of wrong entries must not become millions of error records.
RulePair = Annotated[tuple[Alpha, Beta], FailFast()]
RuleRow = Annotated[tuple[RulePair, ...], FailFast()]
RuleTable = Annotated[tuple[RuleRow, ...], FailFast()]


class Plan(Record):
    """A span rule for every KV head of one model.

    `rules[layer][kv_head] = [alpha, beta]`; see `moa.spans` for what they mean. `sha256` is the digest of everything
    else and is filled in on construction when empty.

    Raises:
        PlanError: from `load_plan` and `Plan.from_json`, for anything that is not a valid plan.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelShape
    length_mode: LengthMode = "running"
    sink_tokens: Size = 64
    min_span_tokens: Count = 128
    rules: RuleTable
    lengths: Annotated[tuple[PlanLength, ...], FailFast()] = ()
    objective: Objective | None = None
    solver: SolverRecord | None = None
    calibration: Calibration | None = None
    validation: Validation | None = None
    created_by: CreatedBy | None = None
    sha256: str = ""

    @model_validator(mode="after")
    def _check(self) -> Plan:
        shape = (self.model.layers, self.model.kv_heads)
        if len(self.rules) != shape[0]:
            raise ValueError(f"rules has {len(self.rules)} layers, model.layers says {shape[0]}")
        for i, layer in enumerate(self.rules):
            if len(layer) != shape[1]:
                raise ValueError(f"rules[{i}] has {len(layer)} KV heads, model.kv_heads says {shape[1]}")
        if self.min_span_tokens <= self.sink_tokens:
            raise ValueError(
                f"min_span_tokens ({self.min_span_tokens}) must exceed sink_tokens ({self.sink_tokens}), "
                "so that every query keeps its own token"
            )
        exact = tuple(tuple((r.alpha, r.beta) for r in (ElasticRule(*p) for p in layer)) for layer in self.rules)
        object.__setattr__(self, "rules", exact)
        digest = self._digest()
        if self.sha256 not in ("", digest):
            raise ValueError(
                f"sha256 is {self.sha256}, the content's digest is {digest}; "
                "after an edit by hand, set sha256 to an empty string"
            )
        object.__setattr__(self, "sha256", digest)
        return self

    def _digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"sha256"})
        for name, later in LATER_FIELDS.items():
            record = getattr(self, name)
            for field in later if record is not None else ():
                if getattr(record, field) == type(record).model_fields[field].default:
                    del content[name][field]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def span_rules(self) -> SpanRules:
        """The rules as arrays [L, HKV], ready for span arithmetic."""
        rules = [[ElasticRule(*pair) for pair in layer] for layer in self.rules]
        return SpanRules(
            alpha=np.array([[r.alpha for r in layer] for layer in rules], dtype=np.int64),
            beta_fixed=np.array([[r.beta_fixed for r in layer] for layer in rules], dtype=np.int64),
            sink_tokens=self.sink_tokens,
            min_span_tokens=self.min_span_tokens,
            length_mode=self.length_mode,
        )

    @property
    def distinct_rules(self) -> int:
        """How many different rules the plan uses."""
        return len({rule for layer in self.rules for rule in layer})

    def kv_bytes(self, n_tokens: int) -> int:
        """Bytes of keys and values kept for one sequence of `n_tokens` in the model's dtype."""
        return self.span_rules.kv_bytes(n_tokens, self.model.head_dim, ELEMENT_BYTES[self.model.dtype])

    def at_length(self, n_tokens: int) -> PlanLength:
        """Density and KV bytes per token at one length."""
        return PlanLength(
            length_tokens=n_tokens,
            density_ratio=self.span_rules.density_ratio(n_tokens),
            kv_bytes_per_token=self.kv_bytes(n_tokens) / n_tokens,
        )

    def to_json(self) -> str:
        """The file's text: one line per layer of rules, so that a person and `diff` can read it."""
        content = self.model_dump(mode="json")
        rows = [json.dumps(layer) for layer in content["rules"]]
        text = json.dumps({**content, "rules": "@rules"}, indent=2)
        # The key is part of what is replaced: no string in a plan can hold these unescaped quotes.
        table = '"rules": [\n    ' + ",\n    ".join(rows) + "\n  ]"
        return text.replace('"rules": "@rules"', table, 1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        write_atomic(Path(path), self.to_json().encode())

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "plan") -> Plan:
        """Read a plan from JSON text; `source` names it in errors.

        Raises:
            PlanError: the text is not JSON, or not a valid plan; names the field, what was wanted and what was got.
        """
        content = parse_json(text, source)
        if not isinstance(content, dict):
            raise PlanError(f"{source}: a plan is a JSON object, got {type(content).__name__}")
        if "alphas" in content and "rules" not in content:
            raise PlanError(
                f"{source}: this is a plan in MoA's alphas/betas form; "
                "turn it into one of ours with: moa plan convert FILE --model-config config.json -o plan.json"
            )
        _check_version(content.get("schema_version", SCHEMA_VERSION), source)
        try:
            return cls.model_validate_json(text if isinstance(text, bytes) else text.encode())
        except ValidationError as error:
            raise PlanError(f"{source}: {explain(error, cls)}") from None

    @classmethod
    def uniform(cls, model: ModelShape, alpha: int, beta: float, **fields: object) -> Plan:
        """Every KV head with the same rule, as StreamingLLM has it."""
        row = ((alpha, beta),) * model.kv_heads
        return cls.model_validate({"model": model, "rules": (row,) * model.layers, **fields})


def load_plan(path: str | Path, revision: str | None = None) -> Plan:
    """Read a plan from a file, from `plan.json` in a folder, or from a hub repository such as "organisation/name".

    Args:
        path: what is there as a file or folder is read from there; only what is not is looked up on the hub.
        revision: of the hub repository: branch, tag or commit.

    Raises:
        PlanError: there is no such file, or it is not a valid plan.
        HubError: there is no such repository, or it is not in the hub's cache and the hub cannot be reached.
    """
    file, name = Path(path), str(path)
    if hub_files.REPO_ID.fullmatch(name) and not file.exists():
        return Plan.from_json(hub_files.read_file(name, PLAN_NAME, revision, MAX_PLAN_BYTES), name)
    if file.is_dir():
        file = file / PLAN_NAME
    return Plan.from_json(read_limited(file), str(file))


def _check_version(version: object, source: str) -> None:
    if type(version) is not int or version < 1:
        raise PlanError(f"{source}: schema_version must be {SCHEMA_VERSION}, got {reprlib.repr(version)}")
    if version > SCHEMA_VERSION:
        raise PlanError(
            f"{source}: schema_version is {reprlib.repr(version)}, this moa reads up to {SCHEMA_VERSION}; "
            "install a newer moa"
        )
