"""Attention and influence by definition: mask, renormalise, first order. The oracle of the sweep; small inputs only (N x N)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moa.profile.sweep import Estimator, Scores, SpanGrid


def attention_rows(q: Tensor, k: Tensor, sinks: Tensor | None, scores: Scores) -> Tensor:
    """Attention probabilities [B, HQ, N, N + 1]; the last column is the sink logits' share, 0 where there are none.

    Args:
        q: [B, HQ, N, D].
        k: [B, HKV, N, D].
        sinks: [HQ] or None.
        scores: how scores come about.
    """
    batch, heads, n, _ = q.shape
    raw = q @ k.repeat_interleave(heads // k.shape[1], 1).mT * scores.scale  # [B, HQ, N, N]
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    p, j = torch.arange(n)[:, None], torch.arange(n)
    if scores.starts is not None:
        starts = scores.starts.expand(k.shape[1], -1).repeat_interleave(heads // k.shape[1], 0)  # [HQ, N]
        outside = (j >= scores.sink_tokens) & (j < starts[..., None])  # [HQ, N, N]
        raw = raw + outside * raw.new_tensor(math.log(scores.attenuation))
    seen = j <= p if scores.window_tokens is None else (j <= p) & (j > p - scores.window_tokens)
    extra = raw.new_full((heads,), -torch.inf) if sinks is None else sinks.to(raw)
    column = extra[None, :, None, None].expand(batch, heads, n, 1)
    return torch.cat((raw.masked_fill(~seen, -torch.inf), column), -1).softmax(-1)


def span_losses(p: Tensor, g: Tensor, grid: SpanGrid, estimator: Estimator) -> Tensor:
    """What each row loses for each span of the grid, [B, HQ, N, S], by masking it key by key.

    Args:
        p: attention probabilities [B, HQ, N, N + 1] as `attention_rows` makes them.
        g: dLoss/dP [B, HQ, N, N + 1].
    """
    n = p.shape[-2]
    i, j = torch.arange(n)[:, None], torch.arange(n + 1)
    effects = single_key_effects(p, g).abs() if estimator == "moa" else p
    losses = []
    for span in grid.spans_tokens:
        keep = (j < grid.sink_tokens) | (j >= i + 1 - (span - grid.sink_tokens)) | (j == n)  # [N, N + 1]
        by_key = estimator == "moa"
        losses.append(torch.where(keep, 0, effects).sum(-1) if by_key else masked_row_loss(p, g, keep))
    stacked = torch.stack(losses, -1)
    return stacked if estimator == "joint" else stacked.abs()


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
