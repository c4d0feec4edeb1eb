"""The candidate rules that the optimizer chooses from, and the span of each at the budget lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moa.errors import UsageError
from moa.spans import DENSE, MAX_TOKENS, ElasticRule, Int64Array, span

# MoA's grid (arXiv 2406.14909, and its released code): alphas in eighths of the longest length, and half the shortest up and
# down, betas in eighths. At its own lengths of 2k to 8k these are the published 48 pairs.
ALPHA_STEPS = 8
MOA_BETAS = tuple(i / 8 for i in range(9))
# What MoA lacks: no window below 1,024 tokens and no share below an eighth, which bounds how low its density can go.
# Halving beta below 1/32 only makes rules that min_span_tokens decides at the lengths people use.
SMALL_BETAS = (1 / 32, 1 / 16, 3 / 32, 3 / 16)
SMALL_WINDOW_TOKENS = 1024
SMALL_STEPS_PER_OCTAVE, LARGE_STEPS_PER_OCTAVE = 4, 2


def rule_grid(
    lengths_tokens: Sequence[int],
    sink_tokens: int,
    min_span_tokens: int,
    *,
    extrapolation_tokens: int | None = None,
    max_rules: int = 120,
    elastic: bool = True,
) -> tuple[ElasticRule, ...]:
    """Candidate rules for the given lengths: dense, windows and small shares of the length, and MoA's grid.

    Windows go from the least span (64 tokens where `moa compress` chooses it for a density of 1/4 or more) up to the
    longest length, four to an octave up to 1,024 tokens and two above. MoA's grid scales with the lengths, so that it
    serves 512 tokens as well as 128k. Rules whose spans agree at every given length and at the extrapolation length are
    one rule; the first in the order dense, windows, shares, MoA's is kept. The grid depends on the arguments alone.

    Args:
        lengths_tokens: the lengths that are profiled or budgeted, in tokens, any order.
        sink_tokens: first tokens that every head keeps.
        min_span_tokens: least span; also the shortest fixed window.
        extrapolation_tokens: a longer length at which rules must differ to count as different; twice the longest
            length when None.
        max_rules: rules with both an alpha and a beta are thinned out evenly until the grid is no larger.
        elastic: whether spans may grow with the length; if not, only the grid's fixed windows (beta = 0) are left.

    Returns:
        Rules sorted by span at the longest length, then at the others; the dense rule comes last, where it is there.

    Raises:
        UsageError: no length, a length below 1, or `min_span_tokens` does not exceed `sink_tokens`.
    """
    _check_arguments(lengths_tokens, sink_tokens, min_span_tokens)
    lengths = sorted(set(lengths_tokens), reverse=True)
    probes = [*lengths, extrapolation_tokens or 2 * lengths[0]]
    shares = [ElasticRule(0, beta) for beta in sorted({*SMALL_BETAS, *MOA_BETAS[1:]})]
    plain = _distinct([DENSE, *_windows(min_span_tokens, lengths[0]), *shares], probes, min_span_tokens)
    every = _distinct([*plain, *moa_grid(lengths[-1], lengths[0])], probes, min_span_tokens)
    kept = plain + _thin(every[len(plain) :], max_rules - len(plain))
    chosen = kept if elastic else [rule for rule in kept if rule.beta == 0]
    return tuple(_by_span(chosen, probes, min_span_tokens))


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


def _windows(shortest_tokens: int, longest_tokens: int) -> list[ElasticRule]:
    windows, exponent, start = [], 0, shortest_tokens
    while (window := round(start * 2 ** (exponent / SMALL_STEPS_PER_OCTAVE))) <= longest_tokens:
        windows.append(ElasticRule(window, 0.0))
        small = window < SMALL_WINDOW_TOKENS
        exponent += 1 if small else SMALL_STEPS_PER_OCTAVE // LARGE_STEPS_PER_OCTAVE
    return windows


def moa_grid(shortest_tokens: int, longest_tokens: int) -> list[ElasticRule]:
    """MoA's pairs: those that keep something of the shortest length and no more than all of the longest."""
    half = shortest_tokens // 2
    alphas = sorted({-half, half, *(longest_tokens * i // ALPHA_STEPS for i in range(ALPHA_STEPS + 1))})
    return [
        ElasticRule(alpha, beta)
        for alpha in alphas
        for beta in MOA_BETAS
        if alpha + beta * longest_tokens <= longest_tokens and alpha + beta * shortest_tokens > 0
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
