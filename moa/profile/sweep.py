"""What one sweep over a layer's attention is asked for: where losses are sampled, and which attention it is.

With P the attention row of query i and G_ij = dO_i . V_j, keeping only the keys K of the row and renormalising changes
the loss, to first order and exactly jointly, by

    dL_i = sum_{j in K} P_ij (G_ij - D_i) / k_i,    k_i = sum_{j in K} P_ij,   D_i = sum_j P_ij G_ij = dO_i . O_i

which is (m D - g_masked)/(1 - m) written from the kept side, where it does not cancel. Spans make K nested, so running
sums along the row give all of them, and P (G - D) is what the gradient needs anyway. MoA's published estimator (arXiv
2406.14909, eq. 3) sums single-key effects |P_ij (D_i - G_ij) / (1 - P_ij)| over the masked keys instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# joint: the change of the loss when everything outside a span is masked, added up with its sign over the rows of a
# position bucket and the query heads of a KV head. rows: the same, without signs. moa: the published sum of single keys.
Estimator = Literal["joint", "rows", "moa"]
Weighting = Literal["text", "token"]
# A row whose kept keys hold less than this share has no numbers left to renormalise; dL_i is then -D_i, as if its output went.
LEAST_MASS = 1e-30


@dataclass(frozen=True, slots=True)
class SpanGrid:
    """Where a profile is sampled: spans in tokens (ascending, sinks included) and position bucket edges [0 .. N]."""

    spans_tokens: tuple[int, ...]
    position_edges: tuple[int, ...]
    sink_tokens: int

    @classmethod
    def for_length(cls, n_tokens: int, sink_tokens: int, min_span_tokens: int, n_positions: int = 32) -> SpanGrid:
        """Spans from the least one to `n_tokens`, each about 19 % above the one before; equal position buckets."""
        spans, value = [], float(min_span_tokens)
        while value < n_tokens:
            spans.append(round(value))
            value *= 2**0.25
        edges = sorted({round(n_tokens * i / n_positions) for i in range(n_positions + 1)})
        return cls((*sorted({*spans} - {n_tokens}), n_tokens), tuple(edges), sink_tokens)

    def window_start(self, positions: Tensor) -> Tensor:
        """First key of the window, int64 [S, T], for every span and each of the rows at `positions` [T]."""
        spans = torch.tensor(self.spans_tokens, device=positions.device)[:, None]  # [S, 1]
        return (positions + 1 - (spans - self.sink_tokens)).clamp(min=self.sink_tokens)

    def bucket(self, positions: Tensor) -> Tensor:
        """The position bucket of each row, int64 [T]; rows beyond the last edge belong to the last one."""
        edges = torch.tensor(self.position_edges, device=positions.device)
        return (torch.bucketize(positions, edges, right=True) - 1).clamp(max=len(self.position_edges) - 2)


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer's scores come about: `cap(scale * q.k)`, plus log(attenuation) for keys outside the reference span.

    Args:
        scale: factor on q.k.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2); None for no cap.
        window_tokens: the layer's own sliding window; older keys are not attended at all. None for no window.
        attenuation: lambda in (0, 1]; 1 is the dense model.
        sink_tokens: keys below it are never attenuated.
        starts: first key of each row's reference window, ascending int64 [HKV, N] or [1, N] on the CPU; unused at
            attenuation 1.
    """

    scale: float
    softcap: float | None = None
    window_tokens: int | None = None
    attenuation: float = 1.0
    sink_tokens: int = 0
    starts: Tensor | None = None

    def first_key(self, position: int) -> int:
        """The oldest key that the row at `position` attends to."""
        return 0 if self.window_tokens is None else max(0, position + 1 - self.window_tokens)
