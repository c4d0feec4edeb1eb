"""Plans that others have made, turned into ours: MoA's alphas/betas files and DuoAttention's pattern files.

MoA gives a rule to every *query* head; the KV heads must keep what any of their query heads wants, so the rules of one KV
group are united (`union_rule`). Its spans were evaluated with the sinks inside, a floor of 128 tokens and the length fixed
at admission, hence length mode "pinned". Its rounding up to blocks of 64 tokens is left out.

DuoAttention gives a score in [0, 1] to every KV head: at or above a threshold it keeps everything, below it sinks and a
recent window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, cast

from moa.errors import PlanError, UsageError
from moa.model_config import ModelConfig
from moa.plan import ModelShape, Plan, parse_json, read_limited
from moa.spans import BETA_ONE, DENSE, MAX_TOKENS, ElasticRule

ImportFormat = Literal["auto", "moa", "duo"]
SINK_TOKENS = 64
MIN_SPAN_TOKENS = 128
DUO_FILE = "full_attention_heads.tsv"
DEFAULT_LENGTHS = (4096, 8192, 16384, 65536)
Table = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What an imported file does not say itself.

    Args:
        max_length_tokens: united rules cover their query heads up to this length; None takes the model's own.
        threshold: DuoAttention scores from here on mean a dense head.
        lengths_tokens: lengths to report costs at; None takes the usual ones that the model can reach.
    """

    max_length_tokens: int | None = None
    threshold: float = 0.5
    lengths_tokens: tuple[int, ...] | None = None


def import_plan(
    path: Path, model: ModelConfig, form: ImportFormat = "auto", options: ImportOptions | None = None
) -> Plan:
    """Read a foreign plan for a model; `auto` takes `.tsv` files and folders for DuoAttention's, all else for MoA's.

    Raises:
        PlanError: the file is not of that form, or its shape is not the model's.
        UsageError: the model does not say its longest length and `options` does not either.
    """
    options = options or ImportOptions()
    if form == "auto":
        form = "duo" if path.is_dir() or path.suffix == ".tsv" else "moa"
    plan = import_duo(path, model, options) if form == "duo" else import_moa(path, model, options)
    return _with_lengths(plan, options.lengths_tokens or _usual_lengths(_longest(model, options)))


def import_moa(path: Path, model: ModelConfig, options: ImportOptions) -> Plan:
    """MoA's `{"alphas": [L][HQ], "betas": [L][HQ]}`, alpha in tokens (may be negative), beta in [0, 1].

    Raises:
        PlanError: not such a file, or not of the model's layers and query heads.
    """
    alphas, betas = _moa_tables(path, model.shape)
    group = model.shape.heads // model.shape.kv_heads
    longest = _longest(model, options)
    rules = []
    for layer_alphas, layer_betas in zip(alphas, betas, strict=True):
        wanted = [covering_rule(a, b) for a, b in zip(layer_alphas, layer_betas, strict=True)]  # [HQ]
        groups = [wanted[i : i + group] for i in range(0, len(wanted), group)]  # [HKV][G]
        rules.append([union_rule(rules_of_group, longest) for rules_of_group in groups])
    return _plan(model.shape, rules, "pinned", SINK_TOKENS, MIN_SPAN_TOKENS)


def covering_rule(alpha: float, beta: float) -> ElasticRule:
    """The least rule in whole tokens and 1/65536 that keeps at least `alpha + beta * n` at every length."""
    return ElasticRule(math.ceil(alpha), math.ceil(Fraction(beta) * BETA_ONE) / BETA_ONE)


def union_rule(
    rules: Sequence[ElasticRule], max_length_tokens: int, min_span_tokens: int = MIN_SPAN_TOKENS
) -> ElasticRule:
    """The smallest rule whose span is at least every given rule's span, at every length up to `max_length_tokens`.

    The largest of several lines is a convex curve, in general no line. The smallest line above a convex curve between two
    lengths is its chord. The chord may start late: below `start` the largest span is the least span or the whole text, and
    any rule that is large enough at `start` has that as well, because no rule grows by more than a token per token. A
    given rule that is as large as all others at both ends is as large everywhere between, and is returned as it is.
    Otherwise beta and alpha are rounded up, by less than 1/65536 and one token.
    """
    stop = max_length_tokens
    start = min(_start(rules, min_span_tokens), stop)
    low, high = (max(_wanted(rule, n) for rule in rules) for n in (start, stop))
    for rule in rules:
        if _wanted(rule, start) == low and _wanted(rule, stop) == high:
            return rule
    beta_fixed = -((low - high) // (stop - start))
    alpha = -((beta_fixed * start - low) // BETA_ONE)
    return ElasticRule(alpha, beta_fixed / BETA_ONE)


def _wanted(rule: ElasticRule, n_tokens: int) -> int:
    """alpha + beta * n in tokens / 65536, exact and before any clipping."""
    return rule.alpha * BETA_ONE + rule.beta_fixed * n_tokens


def _start(rules: Sequence[ElasticRule], min_span_tokens: int) -> int:
    """The length from which on the largest rule is neither the least span nor the whole text."""
    above_floor = min(_first_above(rule, min_span_tokens) for rule in rules)
    return max(above_floor, *(_last_dense(rule) for rule in rules), 1)


def _first_above(rule: ElasticRule, floor_tokens: int) -> int:
    """The first length at which a rule wants more than the floor."""
    if rule.alpha > floor_tokens:
        return 1
    if rule.beta_fixed == 0:
        return MAX_TOKENS
    return (floor_tokens - rule.alpha) * BETA_ONE // rule.beta_fixed + 1


def _last_dense(rule: ElasticRule) -> int:
    """The last length of which a rule wants every token; 0 if there is none."""
    if rule.alpha < 0:
        return 0
    if rule.beta_fixed == BETA_ONE:
        return MAX_TOKENS
    return rule.alpha * BETA_ONE // (BETA_ONE - rule.beta_fixed)


def import_duo(path: Path, model: ModelConfig, options: ImportOptions) -> Plan:
    """DuoAttention's `full_attention_heads.tsv`, scores [L, HKV], with `sink_size` and `recent_size` of its `config.json`.

    Raises:
        PlanError: not such files, or not of the model's layers and KV heads.
    """
    file = path / DUO_FILE if path.is_dir() else path
    scores = _duo_scores(file)
    _check_shape(scores, "scores", (model.shape.layers, model.shape.kv_heads), "KV heads", str(file))
    sink, recent = _duo_window(file.parent / "config.json")
    window = ElasticRule(sink + recent, 0.0)
    rules = [[DENSE if score >= options.threshold else window for score in layer] for layer in scores]
    return _plan(model.shape, rules, "running", sink, sink + recent)


def _duo_scores(file: Path) -> Table:
    try:
        lines = read_limited(file).decode().splitlines()
        scores = [[float(cell) for cell in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:  # a cell that is no number, or bytes that are no text
        raise PlanError(f"{file}: a DuoAttention pattern is a table of numbers with tabs between: {error}") from None
    if not all(math.isfinite(score) for row in scores for score in row):
        raise PlanError(f"{file}: a score is not a finite number")
    return scores


def _duo_window(file: Path) -> tuple[int, int]:
    """Sink and recent tokens; what the pattern was trained for, unless it says what to deploy it with."""
    content = parse_json(read_limited(file), str(file))
    if not isinstance(content, dict):
        raise PlanError(f"{file}: DuoAttention's config is a JSON object, got {type(content).__name__}")
    sizes = []
    for key, least in (("sink_size", 0), ("recent_size", 1)):
        size = content.get(f"deploy_{key}")
        size = content.get(key) if size is None else size
        if type(size) is not int or not least <= size < MAX_TOKENS // 2:
            raise PlanError(f"{file}: {key} must be a whole number of tokens from {least} on, got {size!r}")
        sizes.append(size)
    return sizes[0], sizes[1]


def _moa_tables(path: Path, shape: ModelShape) -> tuple[Table, Table]:
    content = parse_json(read_limited(path), str(path))
    if not isinstance(content, dict) or set(content) != {"alphas", "betas"}:
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise PlanError(f"{path}: MoA's form is an object with the keys alphas and betas, got {str(keys)[:80]}")
    for key, low, high in (("alphas", -MAX_TOKENS, MAX_TOKENS), ("betas", 0, 1)):
        _check_shape(content[key], key, (shape.layers, shape.heads), "query heads", str(path))
        for i, layer in enumerate(content[key]):
            for j, value in enumerate(layer):
                if type(value) not in (int, float) or not low <= value <= high or abs(value) == MAX_TOKENS:
                    raise PlanError(f"{path}: {key}[{i}][{j}] must be a number in [{low}, {high}], got {value!r:.60}")
    return cast(Table, content["alphas"]), cast(Table, content["betas"])


def _check_shape(table: object, name: str, wanted: tuple[int, int], heads: str, source: str) -> None:
    if not isinstance(table, list) or len(table) != wanted[0]:
        got = len(table) if isinstance(table, list) else type(table).__name__
        raise PlanError(f"{source}: {name} must have one row for each of the model's {wanted[0]} layers, got {got}")
    for i, row in enumerate(table):
        if not isinstance(row, list) or len(row) != wanted[1]:
            got = len(row) if isinstance(row, list) else type(row).__name__
            raise PlanError(
                f"{source}: {name}[{i}] must have one number for each of the model's {wanted[1]} {heads}, got {got}"
            )


def _plan(
    shape: ModelShape, rules: Sequence[Sequence[ElasticRule]], length_mode: str, sink_tokens: int, min_span_tokens: int
) -> Plan:
    pairs = tuple(tuple((rule.alpha, rule.beta) for rule in layer) for layer in rules)
    fields = {"length_mode": length_mode, "sink_tokens": sink_tokens, "min_span_tokens": min_span_tokens}
    return Plan.model_validate({"model": shape, "rules": pairs, **fields})


def _with_lengths(plan: Plan, lengths_tokens: Sequence[int]) -> Plan:
    fields = {name: getattr(plan, name) for name in type(plan).model_fields}
    lengths = tuple(plan.at_length(n) for n in lengths_tokens)
    return Plan.model_validate({**fields, "lengths": lengths, "sha256": ""})


def _usual_lengths(longest: int) -> tuple[int, ...]:
    return tuple(n for n in DEFAULT_LENGTHS if n <= longest) or (longest,)


def _longest(model: ModelConfig, options: ImportOptions) -> int:
    longest = options.max_length_tokens or model.max_length_tokens
    if longest is None:
        raise UsageError(
            "the model's config has no max_position_embeddings; say the longest length with --max-length N"
        )
    return longest
