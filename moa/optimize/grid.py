"""The candidate rules that the optimizer chooses from, and the span of each at the budget lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from moa.errors import UsageError
from moa.spans import DENSE, MAX_TOKENS, ElasticRule, Int64Array, span

# Halving beta below 1/32 only makes rules that min_span_tokens decides at the lengths people use.
BETAS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
FIXED_STEPS_PER_OCTAVE = 2
# Mixed rules scale with the shortest and the longest length, so that one grid serves 512 tokens as well as 128k.
MIXED_BETAS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
MIXED_ALPHA_SHARES = (-1 / 4, -1 / 8, -1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def rule_grid(
    lengths_tokens: Sequence[int],
    sink_tokens: int,
    min_span_tokens: int,
    *,
    extrapolation_tokens: int | None = None,
    max_rules: int = 120,
) -> tuple[ElasticRule, ...]:
    """Candidate rules for the given lengths: fixed windows, shares of the length, mixtures of both, and dense.

    Rules whose spans agree at every given length and at the extrapolation length are one rule; the first in the order
    fixed, proportional, mixed is kept. The grid depends on the arguments alone.

    Args:
        lengths_tokens: the lengths that are profiled or budgeted, in tokens, any order.
        sink_tokens: first tokens that every head keeps.
        min_span_tokens: least span; also the shortest fixed window.
        extrapolation_tokens: a longer length at which rules must differ to count as different; twice the longest
            length when None.
        max_rules: mixed rules are thinned out evenly until the grid is no larger.

    Returns:
        Rules sorted by span at the longest length, then at the others; the dense rule comes last.

    Raises:
        UsageError: no length, a length below 1, or `min_span_tokens` does not exceed `sink_tokens`.
    """
    _check_arguments(lengths_tokens, sink_tokens, min_span_tokens)
    lengths = sorted(set(lengths_tokens), reverse=True)
    probes = [*lengths, extrapolation_tokens or 2 * lengths[0]]
    fixed = _fixed(min_span_tokens, lengths[0])
    proportional = [ElasticRule(0, beta) for beta in BETAS]
    plain = _distinct([DENSE, *fixed, *proportional], probes, min_span_tokens)
    every = _distinct([*plain, *_mixed(lengths)], probes, min_span_tokens)
    kept = plain + _thin(every[len(plain) :], max_rules - len(plain))
    return tuple(_by_span(kept, probes, min_span_tokens))


def span_table(rules: Iterable[ElasticRule], lengths_tokens: Sequence[int], min_span_tokens: int) -> Int64Array:
    """Span in tokens of every rule at every length, int64 [C, R]."""
    pairs = np.array([(rule.alpha, rule.beta_fixed) for rule in rules], dtype=np.int64).reshape(-1, 2)
    n = np.array(lengths_tokens, dtype=np.int64)[:, None]
    return span(pairs[:, 0], pairs[:, 1], n, min_span_tokens)  # [C, R]


def _check_arguments(lengths: Sequence[int], sink_tokens: int, min_span_tokens: int) -> None:
    if not lengths or min(lengths) < 1 or max(lengths) >= MAX_TOKENS // 2:
        raise UsageError(f"lengths must be at least one number of tokens in [1, 2**39), got {list(lengths)}")
    if sink_tokens < 0 or min_span_tokens <= sink_tokens:
        raise UsageError(
            f"min_span_tokens ({min_span_tokens}) must exceed sink_tokens ({sink_tokens} >= 0), "
            "so that every query keeps its own token"
        )


def _fixed(min_span_tokens: int, longest: int) -> list[ElasticRule]:
    octaves = max(0.0, np.log2(longest / min_span_tokens))
    steps = np.arange(int(octaves * FIXED_STEPS_PER_OCTAVE) + 1) / FIXED_STEPS_PER_OCTAVE
    return [ElasticRule(round(min_span_tokens * 2**step), 0.0) for step in steps.tolist()]


def _mixed(lengths: Sequence[int]) -> list[ElasticRule]:
    # Offsets relative to both ends of the range: a share of the longest is dense at the shortest, and a share of the
    # shortest is lost in the longest.
    scales = sorted({lengths[0], lengths[-1]})
    return [
        ElasticRule(round(share * scale), beta)
        for scale, beta, share in chain.from_iterable(
            ((scale, beta, share) for beta in (*MIXED_BETAS, 3 / 4, 1.0) for share in MIXED_ALPHA_SHARES)
            for scale in scales
        )
        if not (beta == 1.0 and share > 0)
    ]


def _distinct(rules: Sequence[ElasticRule], probes: Sequence[int], min_span_tokens: int) -> list[ElasticRule]:
    seen: dict[tuple[int, ...], ElasticRule] = {}
    for rule, column in zip(rules, span_table(rules, probes, min_span_tokens).T.tolist(), strict=True):
        seen.setdefault(tuple(column), rule)
    return list(seen.values())


def _thin(rules: list[ElasticRule], room: int) -> list[ElasticRule]:
    if len(rules) <= room:
        return rules
    picks = np.linspace(0, len(rules) - 1, max(0, room)).round().astype(int)
    return [rules[i] for i in dict.fromkeys(picks.tolist())]


def _by_span(rules: list[ElasticRule], probes: Sequence[int], min_span_tokens: int) -> list[ElasticRule]:
    spans = span_table(rules, probes, min_span_tokens).T.tolist()
    order = sorted(range(len(rules)), key=lambda i: (spans[i], rules[i].is_dense, rules[i]))
    return [rules[i] for i in order]
