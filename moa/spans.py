"""All span arithmetic: how many tokens a KV head keeps, where its window begins, what that costs.

    span(n)   = min(n, max(min_span_tokens, ceil(alpha + beta * n)))      tokens kept, sinks included
    keep(p,j) = j <= p and (j < sink_tokens or j >= lo(p))
    lo(p)     = p + 1 - (span(n) - sink_tokens)

with n = p + 1 in length mode "running" and n = N, fixed at admission, in "pinned". `beta` is a multiple of 1/65536, so
every result is exact integer arithmetic and equal in Python, numpy, torch and kernels. Running spans grow by at most
one token per token, so `lo` never moves back: a dropped key is never needed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

LengthMode = Literal["running", "pinned"]
Int64Array = npt.NDArray[np.int64]

BETA_BITS = 16
BETA_ONE = 1 << BETA_BITS
# |alpha| and n stay below this, so that beta_fixed * n fits in a signed 64-bit integer with room to spare.
MAX_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True, order=True)
class ElasticRule:
    """The rule of one KV head: keep `alpha + beta * n` tokens of `n`.

    Args:
        alpha: tokens, may be negative.
        beta: share of the length in [0, 1]; rounded to the nearest 1/65536.

    Raises:
        ValueError: alpha is not a whole number below 2**40 in size, or beta lies outside [0, 1].
    """

    alpha: int
    beta: float

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or self.alpha != self.alpha or abs(self.alpha) >= MAX_TOKENS:
            raise ValueError(f"alpha must be a whole number of tokens below 2**40 in size, got {self.alpha!r}")
        if int(self.alpha) != self.alpha:
            raise ValueError(f"alpha must be a whole number of tokens, got {self.alpha!r}")
        if isinstance(self.beta, bool) or not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta!r}")
        object.__setattr__(self, "alpha", int(self.alpha))
        object.__setattr__(self, "beta", round(self.beta * BETA_ONE) / BETA_ONE)

    @property
    def beta_fixed(self) -> int:
        """beta in units of 1/65536."""
        return round(self.beta * BETA_ONE)

    @property
    def is_dense(self) -> bool:
        """Whether every length keeps every token."""
        return self.beta_fixed == BETA_ONE and self.alpha >= 0


DENSE = ElasticRule(0, 1.0)


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no single truth value to compare by
class SpanRules:
    """The rules of a model's KV heads with what they share; everything about spans is asked here.

    Args:
        alpha: tokens, int64 [L, HKV].
        beta_fixed: beta in 1/65536, int64 [L, HKV].
        sink_tokens: first tokens that every head keeps.
        min_span_tokens: least span, sinks included; above `sink_tokens`, so that a query always keeps itself.
        length_mode: "running" or "pinned".

    Raises:
        ValueError: shapes differ, a rule or the length mode cannot be, or `min_span_tokens` does not exceed `sink_tokens`.
    """

    alpha: Int64Array
    beta_fixed: Int64Array
    sink_tokens: int
    min_span_tokens: int
    length_mode: LengthMode = "running"

    def __post_init__(self) -> None:
        if self.alpha.shape != self.beta_fixed.shape or self.alpha.ndim != 2:
            raise ValueError(f"alpha {self.alpha.shape} and beta {self.beta_fixed.shape} must have one shape [L, HKV]")
        for name, numbers, low, high in (
            ("alpha", self.alpha, 1 - MAX_TOKENS, MAX_TOKENS - 1),
            ("beta_fixed", self.beta_fixed, 0, BETA_ONE),
        ):
            least, most = (numbers.min(), numbers.max()) if numbers.size else (low, high)
            if numbers.dtype != np.int64 or least < low or most > high:
                raise ValueError(
                    f"{name} must be int64 from {low} to {high}, got {numbers.dtype} from {least} to {most}"
                )
        if self.length_mode not in get_args(LengthMode):
            raise ValueError(f"length_mode must be 'running' or 'pinned', got {self.length_mode!r}")
        if self.sink_tokens < 0 or self.min_span_tokens <= self.sink_tokens:
            raise ValueError(
                f"min_span_tokens ({self.min_span_tokens}) must exceed sink_tokens ({self.sink_tokens} >= 0), "
                "so that every query keeps its own token"
            )

    def span(self, n_tokens: int | Int64Array) -> Int64Array:
        """Tokens kept of a sequence of `n_tokens`: [L, HKV] for a number, [L, HKV, ...] for an array of lengths."""
        n = np.asarray(n_tokens, dtype=np.int64)
        alpha, beta = (x.reshape(*x.shape, *(1,) * n.ndim) for x in (self.alpha, self.beta_fixed))
        return span(alpha, beta, n, self.min_span_tokens)

    def window_start(self, position: int | Int64Array, pinned_tokens: int | None = None) -> Int64Array:
        """`lo(p)`: the first position of the window, never below sink_tokens; [L, HKV, *position.shape].

        Above `p` only while every token up to `p` is a sink.

        Raises:
            ValueError: pinned mode without the length that was pinned.
        """
        p = np.asarray(position, dtype=np.int64)
        if self.length_mode == "running":
            kept = self.span(p + 1)
        elif pinned_tokens is None:
            raise ValueError("length mode 'pinned' needs pinned_tokens, the length fixed when the request was admitted")
        else:
            kept = self.span(self.pinned_length(pinned_tokens)).reshape(*self.alpha.shape, *(1,) * p.ndim)
        start: Int64Array = np.maximum(p + 1 - (kept - self.sink_tokens), self.sink_tokens)
        return start

    def pinned_length(self, n_tokens: int) -> int:
        """The length that spans are pinned to for a text of `n_tokens`: at least `min_span_tokens`.

        Up to `n_tokens` that changes nothing; a text that outgrows a short length goes on with a window that holds its
        own token, where `span(n_tokens)` would leave room for sinks alone.
        """
        return max(n_tokens, self.min_span_tokens)

    def density_ratio(self, n_tokens: int) -> float:
        """Mean over layers and KV heads of span(n)/n.

        Raises:
            ValueError: `n_tokens` is below 1.
        """
        if n_tokens < 1:
            raise ValueError(f"a density needs a length of at least 1 token, got {n_tokens}")
        return float(self.span(n_tokens).mean() / n_tokens)

    def kv_bytes(self, n_tokens: int, head_dim: int, element_bytes: int) -> int:
        """Bytes of keys and values kept for one sequence of `n_tokens`."""
        return int(self.span(n_tokens).sum()) * 2 * head_dim * element_bytes


def span(alpha: Int64Array, beta_fixed: Int64Array, n_tokens: Int64Array, min_span_tokens: int) -> Int64Array:
    """Elementwise span of broadcastable int64 arrays, exact: ceil(b*n / 65536) is -((-b*n) >> 16)."""
    wanted = alpha - ((-beta_fixed * n_tokens) >> BETA_BITS)
    kept: Int64Array = np.minimum(n_tokens, np.maximum(min_span_tokens, wanted))
    return kept


def keep(position: int, key: int, window_start: int, sink_tokens: int) -> bool:
    """Whether the query at `position` attends to `key`."""
    return key <= position and (key < sink_tokens or key >= window_start)
