"""The block sweep: what each query row loses when its span shrinks, for every span at once, with no N x N tensor.

With P the attention row of query i and G_ij = dO_i . V_j, keeping only the keys K of the row and renormalising changes
the loss, to first order and exactly jointly, by

    dL_i = g_i / k_i - D_i,    k_i = sum_{j in K} P_ij,   g_i = sum_{j in K} P_ij G_ij,   D_i = sum_j P_ij G_ij

which is (m D - g_masked)/(1 - m) written from the kept side, where it does not cancel. Spans make K nested, so prefix
sums along the row give all of them. MoA's published estimator (arXiv 2406.14909, eq. 3) sums single-key effects
|P_ij (D_i - G_ij) / (1 - P_ij)| over the masked keys instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["joint", "moa"]
# A row whose kept keys hold less than this share has no numbers left to renormalise; dL_i is then bounded by G itself.
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


def row_losses(p: Tensor, g: Tensor, lo: Tensor, positions: Tensor, sink_tokens: int, estimator: Estimator) -> Tensor:
    """|dL_i| of each row for each span.

    Args:
        p: attention rows [..., T, N], 0 above the diagonal.
        g: dLoss/dP [..., T, N].
        lo: first key of the window for each span and row, int64 [S, T].
        positions: the rows' positions, int64 [T].
        sink_tokens: keys below it are always kept.
        estimator: "joint" (exact joint masking) or "moa" (sum of single-key effects).

    Returns:
        [..., S, T]; exactly 0 where the span covers the row.
    """
    d = (p * g).sum(-1, keepdim=True)  # [..., T, 1]
    covers = lo <= sink_tokens  # [S, T]: nothing is masked
    if estimator == "moa":
        effect = (p * (d - g)).abs() / (1 - p).clamp(min=torch.finfo(p.dtype).eps)
        return _prefix_at(effect, lo, sink_tokens).masked_fill(covers, 0.0)
    kept_mass = _kept(p, lo, positions, sink_tokens)
    kept_gain = _kept(p * g, lo, positions, sink_tokens)
    change = kept_gain / kept_mass.clamp(min=LEAST_MASS) - d.mT  # [..., S, T]
    return change.abs().masked_fill(covers, 0.0)


def _prefix_at(x: Tensor, lo: Tensor, sink_tokens: int) -> Tensor:
    """Sum of x[..., t, sink:lo[s, t]] as [..., S, T]."""
    prefix = torch.nn.functional.pad(x[..., sink_tokens:].cumsum(-1), (1, 0))  # [..., T, N - sink + 1]
    return _take(prefix, (lo - sink_tokens).clamp(max=prefix.shape[-1] - 1))


def _kept(x: Tensor, lo: Tensor, positions: Tensor, sink_tokens: int) -> Tensor:
    """Sum of x over the sinks and the window [lo[s, t], p_t], as [..., S, T]; summed from the diagonal, without cancelling."""
    suffix = torch.nn.functional.pad(x.flip(-1).cumsum(-1).flip(-1), (0, 1))  # [..., T, N + 1]
    window = _take(suffix, lo.clamp(max=x.shape[-1]))
    return window + x[..., :sink_tokens].sum(-1)[..., None, :]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[..., t, index[s, t]] as [..., S, T]."""
    gathered = x.gather(-1, index.mT.expand(*x.shape[:-1], index.shape[0]))  # [..., T, S]
    return gathered.mT
