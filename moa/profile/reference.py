"""Influence by definition: mask, renormalise, first order. The oracle of the sweep; small inputs only (N x N)."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_row_loss(p: Tensor, g: Tensor, keep: Tensor) -> Tensor:
    """Change of the loss, to first order in the attention row, when only `keep` stays and the row is renormalised.

    Args:
        p: attention probabilities [..., N].
        g: dLoss/dP [..., N].
        keep: bool [..., N].

    Returns:
        sum_j (p'_j - p_j) g_j over the last axis, p' the renormalised row.
    """
    kept = torch.where(keep, p, 0)
    return ((kept / kept.sum(-1, keepdim=True) - p) * g).sum(-1)


def single_key_effects(p: Tensor, g: Tensor) -> Tensor:
    """The change of the loss for each key masked alone, [..., N] (MoA, arXiv 2406.14909, eq. 13, by brute force)."""
    n = p.shape[-1]
    alone = ~torch.eye(n, dtype=torch.bool)  # [N, N]: row j keeps everything but j
    return masked_row_loss(p[..., None, :], g[..., None, :], alone)
