"""What to compress to, and how to find out how: the settings of `moa.compress`, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from moa.errors import UsageError
from moa.optimize.budget import check_least
from moa.plan import Budget
from moa.profile.chat import ChatTemplate
from moa.profile.dataset import parse_columns
from moa.profile.supervise import MAX_ANSWER_TOKENS
from moa.profile.sweep import Estimator, Weighting
from moa.profile.synthetic import SYNTHETIC
from moa.spans import ElasticRule, span

Supervision = Literal["model", "reference"]


@dataclass(frozen=True, slots=True)
class CompressSettings:
    """What to compress to, and how to find out how.

    Args:
        density: share of the KV cache to keep, at every profiled length and at the validation length.
        budget: where `density` comes from if it was asked for in bytes or milliseconds; see `moa.optimize.budget`. It
            holds at the budget's own length as well.
        lengths_tokens: the profiled lengths.
        validate_length_tokens: a longer length, never profiled, at which the plan is chosen.
        dataset: "synthetic", a JSON-lines or Parquet file, a data set's folder, or a hub id; see `moa.profile.dataset`.
        dataset_config, dataset_split: which part of a hub's or folder's data set.
        columns: `ours=theirs` names of its columns, separated by commas.
        chat_template: whether texts are written by the tokenizer's chat template: "auto" where it has one, "on", "off".
        num_samples: calibration texts per length; half as many for validation.
        seed: of the texts.
        estimator: "joint" masking with signs, "rows" without them, or "moa", the published one; see `sweep`.
        rounds: profiles and plans; each round after the first profiles at the plan that the one before found.
        supervision: whose answers count, the dense model's or the data's.
        mixed_lengths: whether a length's synthetic texts have from half of it to all of it, instead of all of it; a
            data set's texts always do.
        max_answer_tokens: most tokens that the model writes, and of a plain text's end that count as its answer.
        rules: the candidate rules; None takes `moa.optimize.grid.rule_grid`.
        max_rules_per_layer: distinct rules in one layer.
        elastic: whether spans may grow with the length; if not, every rule is a fixed window (beta = 0).
        per_layer: one rule for all KV heads of a layer.
        sink_tokens, min_span_tokens: of the plan; None fits them to the shortest length and the density.
        max_candidates: plans of the Pareto front that are tried at the unseen length.
        gradient_checkpointing: compute activations again instead of keeping them; None where memory would be short.
        front_levels: how finely the front between the lengths' losses is sampled; see `pareto_front`.

    Raises:
        UsageError: numbers that cannot be meant.
        InfeasibleError: the shortest rule exceeds the budget; names the length and the least possible value.
    """

    density: float = 0.5
    budget: Budget | None = None
    lengths_tokens: tuple[int, ...] = (2048, 4096, 8192)
    validate_length_tokens: int | None = None
    dataset: str = SYNTHETIC
    dataset_config: str | None = None
    dataset_split: str | None = None
    columns: str = ""
    chat_template: ChatTemplate = "auto"
    num_samples: int = 16
    seed: int = 0
    estimator: Estimator = "joint"
    rounds: int = 1
    supervision: Supervision = "model"
    mixed_lengths: bool = False
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    rules: tuple[ElasticRule, ...] | None = None
    max_rules_per_layer: int = 4
    elastic: bool = True
    per_layer: bool = False
    sink_tokens: int | None = None
    min_span_tokens: int | None = None
    max_candidates: int = 8
    gradient_checkpointing: bool | None = None
    front_levels: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(f"--density must lie in (0, 1], got {self.density}")
        if self.budget is not None and self.budget.density_ratio != self.density:
            raise UsageError(
                f"{self.budget.option} is a density of {self.budget.density_ratio}, and a density of {self.density} is "
                "asked for as well; give one budget"
            )
        if not self.lengths_tokens or list(self.lengths_tokens) != sorted({*self.lengths_tokens}):
            raise UsageError(f"--lengths must be distinct and ascending, got {list(self.lengths_tokens)}")
        if self.lengths_tokens[0] < 64:
            raise UsageError(f"--lengths must be at least 64 tokens, got {self.lengths_tokens[0]}")
        for name, value, least in (
            ("max-rules-per-layer", self.max_rules_per_layer, 1),
            ("max-candidates", self.max_candidates, 1),
            ("rounds", self.rounds, 1),
            ("sink-tokens", self.spans[0], 0),
            ("min-span-tokens", self.spans[1], 1),
            ("max-answer-tokens", self.max_answer_tokens, 1),
        ):
            if value < least:
                raise UsageError(f"--{name} must be at least {least}, got {value}")
        for name, choice, known in (
            ("estimator", self.estimator, get_args(Estimator)),
            ("supervision", self.supervision, get_args(Supervision)),
            ("chat-template", self.chat_template, get_args(ChatTemplate)),
        ):
            if choice not in known:
                raise UsageError(f"--{name} must be one of {', '.join(known)}, got {choice!r}")
        if self.unseen_tokens <= self.lengths_tokens[-1]:
            raise UsageError(
                f"--validate-length ({self.unseen_tokens}) must exceed the profiled lengths (up to {self.lengths_tokens[-1]})"
            )
        if self.max_answer_tokens > self.lengths_tokens[0] // 2:
            raise UsageError(
                f"--max-answer-tokens ({self.max_answer_tokens}) must leave half of the shortest length "
                f"({self.lengths_tokens[0]}) to the text"
            )
        growing = [rule for rule in self.rules or () if rule.beta != 0]
        if growing and not self.elastic:
            raise UsageError(
                f"--no-elastic takes rules with beta = 0 alone, and --rules has {len(growing)} others, such as "
                f"[{growing[0].alpha}, {growing[0].beta:g}]; leave them out, or leave out --no-elastic"
            )
        parse_columns(self.columns)
        named = [
            f"--{name}"
            for name in ("dataset-config", "dataset-split", "columns")
            if getattr(self, name.replace("-", "_"))
        ]
        if self.dataset == SYNTHETIC and named:
            raise UsageError(f"{named[0]} says how to read a data set; name one with --dataset")
        if self.num_samples < 2:
            raise UsageError(f"--num-samples must be at least 2, got {self.num_samples}")
        if self.spans[1] <= self.spans[0]:
            raise UsageError(f"--min-span-tokens ({self.spans[1]}) must exceed --sink-tokens ({self.spans[0]})")
        check_least(self.density, self.budget, self.budget_lengths, self.least_spans_tokens)

    @property
    def least_spans_tokens(self) -> list[int]:
        """The shortest span of any candidate rule at every budget length."""
        least = self.spans[1]
        if self.rules is None:
            return [min(n, least) for n in self.budget_lengths]
        return [
            min(int(span(np.array(r.alpha), np.array(r.beta_fixed), np.array(n), least)) for r in self.rules)
            for n in self.budget_lengths
        ]

    @property
    def budget_lengths(self) -> tuple[int, ...]:
        """Where the density holds: the profiled lengths, the validation length, and the budget's own, in that order."""
        own = self.budget.context_tokens if self.budget else None
        return tuple(dict.fromkeys((*self.lengths_tokens, self.unseen_tokens, *([own] if own else []))))

    @property
    def unseen_tokens(self) -> int:
        """The validation length; twice the longest profiled one by default."""
        asked = self.validate_length_tokens
        return 2 * self.lengths_tokens[-1] if asked is None else asked

    @property
    def weighting(self) -> Weighting:
        """Every answer alike, which predicts best (recipes/benchmarks/influence); MoA's estimator as it was published."""
        return "text" if self.estimator == "moa" else "token"

    @property
    def spans(self) -> tuple[int, int]:
        """Sink and least span in tokens. The default leaves the shortest length's budget room to differ between heads."""
        room = int(self.density * self.lengths_tokens[0]) // 8
        fitted = max(16, min(64, 1 << max(0, room.bit_length() - 1)))
        least = fitted if self.min_span_tokens is None else self.min_span_tokens
        return least // 2 if self.sink_tokens is None else self.sink_tokens, least


def default_lengths(context_tokens: int | None) -> tuple[int, ...]:
    """Three lengths to profile, each twice the one before: up to 8,192, or half the model's context if that is less."""
    longest = 8192 if context_tokens is None else min(8192, context_tokens // 2)
    return longest // 4, longest // 2, longest
