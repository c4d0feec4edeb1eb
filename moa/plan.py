"""The plan: which span each KV head gets. Pure data, as one JSON file.

Loading never executes anything, and a file too large for any plan is refused unread, so what it allocates is bounded.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from moa import hub_files
from moa.errors import PlanError, closest
from moa.files import write_atomic
from moa.spans import MAX_TOKENS, ElasticRule, LengthMode, SpanRules

SCHEMA_VERSION: Final = 1
PLAN_NAME = "plan.json"
# A model of 200 layers with 128 KV heads makes a plan below 1 MiB.
MAX_PLAN_BYTES = 8 << 20
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
        "lengths",
    ),
    "objective": ("budget",),
}
ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

Count = Annotated[int, Field(gt=0, lt=MAX_TOKENS)]
Size = Annotated[int, Field(ge=0, lt=MAX_TOKENS)]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Alpha = Annotated[int, Field(gt=-MAX_TOKENS, lt=MAX_TOKENS)]
Beta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# FailFast: a file full of wrong entries must not become millions of error records.
Counts = Annotated[tuple[Count, ...], FailFast()]
RulePair = Annotated[tuple[Alpha, Beta], FailFast()]
RuleRow = Annotated[tuple[RulePair, ...], FailFast()]
RuleTable = Annotated[tuple[RuleRow, ...], FailFast()]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelShape(_Record):
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


class PlanLength(_Record):
    """What the plan costs at one length."""

    length_tokens: Count
    density_ratio: Ratio
    kv_bytes_per_token: Ratio


class Budget(_Record):
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


class Objective(_Record):
    """What the optimizer minimised and under which budget."""

    predicted_loss: Finite
    density_budget_ratio: Ratio
    lengths_tokens: Counts
    max_rules_per_layer: Count | None = None
    budget: Budget | None = None


class SolverRecord(_Record):
    """What made the plan and how far from optimal it can be; a baseline minimised nothing and has no bound."""

    name: str
    status: str
    milp_status: str
    bound: Finite | None
    gap_ratio: Finite | None


class CalibrationLength(_Record):
    """The texts of one length: how many there were of those wanted, the shortest, how many were cut and by how much."""

    length_tokens: Count
    samples: Count
    wanted_samples: Count
    shortest_tokens: Count | None = None
    truncated_samples: Size = 0
    truncated_tokens: Size = 0
    answer_tokens: Count


class Calibration(_Record):
    """What the profile was measured on. `chat_template_sha256` is "" where no template was applied."""

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
    lengths: Annotated[tuple[CalibrationLength, ...], FailFast()] = ()


class Validation(_Record):
    """True loss of the chosen plan beside the dense model's, at a length that was not profiled."""

    length_tokens: Count
    samples: Count
    dense_loss: Finite
    sparse_loss: Finite
    candidates: Count


class CreatedBy(_Record):
    """Versions that made the plan."""

    moa: str
    torch: str
    transformers: str


class Plan(_Record):
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


def read_limited(file: Path) -> bytes:
    """The bytes of a plan file, refused above 8 MiB.

    Raises:
        PlanError: the file is missing, unreadable or too large.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_PLAN_BYTES + 1)
    except FileNotFoundError:
        raise PlanError(f"{file}: no such file; make a plan with: moa compress MODEL -o OUT") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise PlanError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_PLAN_BYTES:
        raise PlanError(f"{file}: larger than {MAX_PLAN_BYTES} bytes; no plan is")
    return data


def parse_json(text: str | bytes, source: str) -> object:
    """Strict JSON: no NaN or Infinity, no repeated key, no absurd depth or number.

    Raises:
        PlanError: anything else; names line and column where there are any.
    """

    def no_constant(name: str) -> NoReturn:
        raise PlanError(f"{source}: {name} is not a number that JSON knows")

    def no_repeat(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise PlanError(f"{source}: the key {reprlib.repr(repeated)} occurs twice in one object")
        return content

    try:
        raw = text.encode() if isinstance(text, str) else text
        # decoded here, because json.loads would guess UTF-16 and UTF-32 as well
        return json.loads(raw.decode(), parse_constant=no_constant, object_pairs_hook=no_repeat)
    except json.JSONDecodeError as error:
        raise PlanError(f"{source}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"{source}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise PlanError(f"{source}: not a plan: objects nested too deeply") from None
    except ValueError as error:
        raise PlanError(f"{source}: not a plan: {error}") from None


def explain(error: ValidationError, record: type[BaseModel]) -> str:
    """The first thing wrong with a record, in one line: field, what was wanted, what was got."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(record, first["loc"][:-1])
        return f"unknown key {where!r}{closest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("value_error", "json_invalid"):
        message += f", got {reprlib.repr(first['input'])}"
    return f"{where}: {message}" if where else message


def _path(loc: tuple[int | str, ...]) -> str:
    """`rules[3][0]`, `model.layers`; "" for the record itself."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(record: type[BaseModel], loc: tuple[int | str, ...]) -> Mapping[str, object]:
    for part in loc:
        field = record.model_fields.get(str(part))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        record = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), record)
    return record.model_fields
