"""The plans that kernels are measured under: one span everywhere, MoA's published rules, and plans read from files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moa.errors import UsageError, closest
from moa.eval.gpu.heads import HEADS, HeadShape
from moa.eval.labels import percent
from moa.model_config import ModelConfig
from moa.plan import ModelShape, load_plan, parse_json, read_limited
from moa.plan_import import ImportOptions, import_moa
from moa.spans import BETA_ONE, DENSE, ElasticRule, LengthMode, SpanRules

SINK_TOKENS, MIN_SPAN_TOKENS = 64, 128
DENSITIES = (0.125, 0.25, 0.5, 1.0)
# A plan of many layers is measured on so many of them, spread evenly.
PLAN_LAYERS = 4
# The longest length of the grid: united rules of imported plans hold up to there.
LONGEST_TOKENS = 1 << 17

# Layers of the plan that MoA publishes for Llama-3-8B-Instruct-262k (github.com/thu-nics/MoA, examples, MIT): two rules
# (alpha, beta) each, and the share of heads under the first. Published per query head; here per KV head, so that no
# group has to keep the union of its heads.
PUBLISHED_LAYERS = (
    ((-1024, 1.0), (1024, 0.0), 3 / 8),
    ((0, 0.75), (1024, 0.0), 5 / 8),
    ((3072, 0.375), (0, 0.25), 1 / 2),
    ((-1024, 1.0), (0, 0.125), 3 / 8),
)


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Rules of one or more layers [L, HKV], and what a table calls them.

    `published` marks rules that MoA published, to which some targets apply.
    """

    name: str
    rules: SpanRules
    published: bool = False

    @property
    def layers(self) -> int:
        """Layers that take turns while time is measured."""
        return int(self.rules.alpha.shape[0])

    @property
    def is_dense(self) -> bool:
        """Whether every head keeps everything."""
        return bool((self.rules.beta_fixed == BETA_ONE).all() and (self.rules.alpha >= 0).all())

    def mean_span(self, n_tokens: int) -> int:
        """The window that costs the same KV memory if all heads had it, in tokens."""
        return round(float(self.rules.span(n_tokens).mean()))


def span_rules(layers: Sequence[Sequence[ElasticRule]], mode: LengthMode = "running") -> SpanRules:
    """Rules of layers [L][HKV] with the usual sink and least span."""
    alpha = np.array([[rule.alpha for rule in layer] for layer in layers], dtype=np.int64)  # [L, HKV]
    beta = np.array([[rule.beta_fixed for rule in layer] for layer in layers], dtype=np.int64)  # [L, HKV]
    return SpanRules(alpha, beta, SINK_TOKENS, MIN_SPAN_TOKENS, mode)


def uniform(density: float, heads: HeadShape) -> Pattern:
    """Every head keeps one share of the text."""
    name = "dense" if density == 1 else f"uniform {percent(density)}"
    return Pattern(name, span_rules([[ElasticRule(0, density)] * heads.kv_heads]))


def window(tokens: int, heads: HeadShape) -> Pattern:
    """Every head keeps the sinks and the last `tokens`, itself included."""
    return Pattern(f"window {tokens:,}", span_rules([[ElasticRule(tokens + SINK_TOKENS, 0.0)] * heads.kv_heads]))


def published(heads: HeadShape) -> Pattern:
    """MoA's rules for Llama-3-8B on the KV heads of any shape, running."""
    layers = []
    for first, second, share in PUBLISHED_LAYERS:
        count = max(1, round(share * heads.kv_heads))
        layers.append([ElasticRule(*first)] * count + [ElasticRule(*second)] * (heads.kv_heads - count))
    return Pattern("MoA rules", span_rules(layers), published=True)


def small(heads: HeadShape) -> Pattern:
    """Rules whose windows move within a few hundred tokens, for comparing with the reference."""
    rules = (ElasticRule(200, 0.0), ElasticRule(-50, 0.5), DENSE, ElasticRule(0, 0.25))
    return Pattern("small", span_rules([[rules[h % len(rules)] for h in range(heads.kv_heads)]]))


def from_file(heads_name: str, path: Path) -> tuple[HeadShape, Pattern]:
    """Some layers of a plan: of moa's plan.json, or of MoA's alphas/betas, which do not say how many KV heads there are.

    Args:
        heads_name: a shape of `HEADS` for MoA's form; for a plan.json just its name in tables.
        path: the file.

    Raises:
        InputError: the file cannot be read, or is neither.
        UsageError: MoA's form, and no known shape of that name.
    """
    content = parse_json(read_limited(path), str(path))
    is_published = isinstance(content, dict) and set(content) == {"alphas", "betas"}
    if is_published:
        known = {heads.name: heads for heads in HEADS}
        if heads_name not in known:
            raise UsageError(
                f"{path} does not say its KV heads; call it {' or '.join(known)}, not {heads_name!r}"
                f"{closest(heads_name, known)}"
            )
        shape = _moa_shape(content, known[heads_name])
        plan = import_moa(path, ModelConfig(shape, LONGEST_TOKENS), ImportOptions(lengths_tokens=(LONGEST_TOKENS,)))
    else:
        plan = load_plan(path)
    model = plan.model
    heads = HeadShape(heads_name, model.heads, model.kv_heads, model.head_dim)
    return heads, Pattern(f"plan {path.stem}", _spread(plan.span_rules), is_published)


def _moa_shape(content: Any, heads: HeadShape) -> ModelShape:
    layers = len(content["alphas"]) if isinstance(content["alphas"], list) else 0
    return ModelShape(
        architecture="any", layers=max(1, layers), heads=heads.heads, kv_heads=heads.kv_heads, head_dim=heads.head_dim
    )


def _spread(rules: SpanRules) -> SpanRules:
    layers = rules.alpha.shape[0]
    chosen = sorted({math.floor((i + 0.5) * layers / PLAN_LAYERS) for i in range(PLAN_LAYERS)})
    return SpanRules(
        rules.alpha[chosen], rules.beta_fixed[chosen], rules.sink_tokens, rules.min_span_tokens, rules.length_mode
    )
