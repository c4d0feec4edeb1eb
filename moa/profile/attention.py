"""Attention that profiles itself: its backward pass computes the gradients and, in the same sweep, the influence.

It works block by block over query rows, so memory grows with N, never with N x N. Scores of keys outside a reference
span are shifted by log(lambda): gradients vanish where a dense model is already sure, and come back on the way to the
sparse model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from moa.errors import ModelError
from moa.profile.sweep import Estimator, SpanGrid, row_losses
from moa.spans import ElasticRule, span

NAME = "moa_profile"
# Elements of one [HQ, rows, N] tile; a handful of such tiles is all the extra memory there is.
TILE_ELEMENTS = 1 << 21


@dataclass(slots=True)
class Probe:
    """What one profiling pass wants and what it has summed up so far.

    Args:
        grid: where the losses are sampled.
        estimator: "joint" or "moa".
        attenuation: lambda in (0, 1]; 1 is the dense model.
        reference_rule: the span outside of which scores are attenuated.
        min_span_tokens: least span of the reference rule.
        losses: layer -> float64 [HKV, position buckets, spans], summed over rows and query heads.
    """

    grid: SpanGrid
    estimator: Estimator
    attenuation: float
    reference_rule: ElasticRule
    min_span_tokens: int
    losses: dict[int, Tensor] = field(default_factory=dict)

    def score_shift(self, positions: Tensor, n_keys: int) -> Tensor | None:
        """log(lambda) where a row's key lies outside the reference span, [T, N]; None for the dense model."""
        if self.attenuation == 1.0:
            return None
        rows = positions.cpu().numpy()
        rule = self.reference_rule
        kept = torch.from_numpy(span(rule.alpha, rule.beta_fixed, rows + 1, self.min_span_tokens)).to(positions)  # type: ignore[arg-type]  # scalars broadcast
        lo = positions + 1 - (kept - self.grid.sink_tokens)  # [T]
        keys = torch.arange(n_keys, device=positions.device)
        outside = (keys >= self.grid.sink_tokens) & (keys < lo[:, None])  # [T, N]
        return outside * math.log(self.attenuation)

    def add(self, layer: int, p: Tensor, g: Tensor, positions: Tensor) -> None:
        """Sum the rows' losses into their position buckets; p and g are [B, HKV, G, T, N]."""
        lo = self.grid.window_start(positions)
        rows = row_losses(p, g, lo, positions, self.grid.sink_tokens, self.estimator)  # [B, HKV, G, S, T]
        rows = rows.double().sum((0, 2)).mT  # [HKV, T, S]
        edges = torch.tensor(self.grid.position_edges, device=positions.device)
        bucket = (torch.bucketize(positions, edges, right=True) - 1).clamp(max=len(edges) - 2)
        total = self.losses.get(layer)
        if total is None:
            shape = (rows.shape[0], len(edges) - 1, rows.shape[-1])
            total = self.losses[layer] = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        total.index_add_(1, bucket, rows)


_ACTIVE: ContextVar[Probe] = ContextVar("moa_profile_probe")


@contextmanager
def probing(probe: Probe) -> Iterator[None]:
    """All attention inside the block reports to `probe`."""
    token = _ACTIVE.set(probe)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def register() -> None:
    """Make the attention function known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, HQ, N, D], key and value [B, HKV, N, D] -> [B, N, HQ, D]."""
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ModelError(f"profiling does not know attention with {name!r} yet; this model cannot be profiled")
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ModelError("profiling takes whole, unpadded sequences without a cache")
    if options.get("sliding_window") is not None and options["sliding_window"] < key.shape[2]:
        raise ModelError("profiling does not know a model's own sliding windows yet; this model cannot be profiled")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Half precision loses the small differences that influence is made of.
    full = [x if x.dtype == torch.float64 else x.float() for x in (query, key, value)]
    out = _ProfiledAttention.apply(*full, scale, int(module.layer_idx), _ACTIVE.get())  # type: ignore[no-untyped-call, arg-type]  # torch types neither
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


class _ProfiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int, probe: Probe) -> Tensor:
        grouped = _group(q, k.shape[1])  # [B, HKV, G, N, D]
        out = torch.empty_like(grouped)
        for rows, attend in _tiles(grouped, k, scale, probe):
            out[..., rows, :] = attend() @ v[:, :, None, : rows.stop]
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.layer, ctx.probe = scale, layer, probe
        return out.view_as(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grouped, d_out = _group(q, k.shape[1]), _group(grads[0], k.shape[1])
        dq, dk, dv = torch.empty_like(grouped), torch.zeros_like(k), torch.zeros_like(v)
        for rows, attend in _tiles(grouped, k, ctx.scale, ctx.probe):
            p, stop, b_do = attend(), rows.stop, d_out[..., rows, :]  # p [B, HKV, G, T, N]
            g = b_do @ v[:, :, None, :stop].mT  # [B, HKV, G, T, N]
            ctx.probe.add(ctx.layer, p, g, torch.arange(rows.start, stop, device=q.device))
            dv[:, :, :stop] += (p.mT @ b_do).sum(2)
            ds = p * (g - (p * g).sum(-1, keepdim=True)) * ctx.scale
            dq[..., rows, :] = ds @ k[:, :, None, :stop]
            dk[:, :, :stop] += (ds.mT @ grouped[..., rows, :]).sum(2)
        return dq.view_as(q), dk, dv, None, None, None


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """[B, HQ, N, D] -> [B, HKV, G, N, D]."""
    return x.contiguous().view(x.shape[0], kv_heads, -1, *x.shape[2:])


def _tiles(q: Tensor, k: Tensor, scale: float, probe: Probe) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
    """Blocks of query rows, each with a function that makes its attention rows [B, HKV, G, T, rows.stop]."""
    n = q.shape[-2]
    rows_per_tile = max(16, TILE_ELEMENTS // (q.shape[0] * q.shape[1] * q.shape[2] * n))
    for start in range(0, n, rows_per_tile):
        rows = slice(start, min(n, start + rows_per_tile))

        def attend(rows: slice = rows) -> Tensor:
            scores = (q[..., rows, :] @ k[:, :, None, : rows.stop].mT) * scale
            positions = torch.arange(rows.start, rows.stop, device=q.device)
            above = torch.arange(rows.stop, device=q.device) > positions[:, None]  # [T, N]
            shift = probe.score_shift(positions, rows.stop)
            if shift is not None:
                scores += shift.to(scores)
            return scores.masked_fill_(above, float("-inf")).softmax(-1)

        yield rows, attend
