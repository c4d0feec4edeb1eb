"""How a layer scores keys beyond plain softmax: a cap on the scores, learned sinks, and attention that applies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch.utils.checkpoint import checkpoint

# Scores of one tile of query rows; a few such tensors are all the extra memory there is, at any number of keys.
TILE_ELEMENTS = 1 << 22

# An output [..., T, D], and its log-sum-exp over the keys [..., T] (natural log, learned sinks left out) where wanted.
Attended = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores are `cap(scale * q.k)`, `cap(x) = softcap * tanh(x / softcap)`; a sink is one more logit without a value.

    Args:
        scale: factor on q.k.
        softcap: bound on the scores (Gemma 2, arXiv 2408.00118, section 2); None for none.
        sinks: learned logit per query head, [HQ], or [HKV, G] once grouped; None for none.
        wants_lse: whether the log-sum-exp of the scores is asked for; some kernels compute it only then.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    wants_lse: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether stock kernels compute these scores."""
        return self.softcap is None and self.sinks is None

    def heads(self, index: slice | torch.Tensor) -> Self:
        """The scores of some rows of `sinks`."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[index])

    def grouped(self, kv_heads: int) -> Self:
        """The same with `sinks` as [HKV, G]."""
        return self if self.sinks is None else replace(self, sinks=self.sinks.view(kv_heads, -1))

    def capped(self, products: torch.Tensor) -> torch.Tensor:
        """Scores from products q.k, of any shape."""
        scaled = products * self.scale
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap

    def add_sinks(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Output [..., T, D] with the sinks' share of the softmax taken away; lse [..., T], sinks broadcast as [..., 1]."""
        if self.sinks is None:
            return out
        share = torch.sigmoid(lse - self.sinks.to(lse)[..., None])  # softmax mass of the keys, [..., T]
        return (out * share[..., None]).to(out.dtype)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the log-sum-exp of queries of `dtype`: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def join_attended(parts: Sequence[Attended], dim: int) -> Attended:
    """Several outputs as one along `dim`, counted from the front; all have a log-sum-exp, or none."""
    if len(parts) == 1:
        return parts[0]
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts], dim), torch.cat(lses, dim) if lses else None


def scored_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scores: Scores
) -> Attended:
    """Attention that no stock kernel computes, tile by tile in float32 (float64 if `q` is); rows are recomputed in backward.

    Args:
        q: queries [Hg, G, T, D].
        keys: [Hg, N, D].
        values: [Hg, N, D].
        mask: which query sees which key, bool [T, N]; None for all. Every query sees a key.
        scores: with sinks [Hg, G], if any.

    Returns:
        [Hg, G, T, D] in `q`'s dtype, and the log-sum-exp [Hg, G, T] if `scores` wants it.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys, values = q.to(work), keys.to(work), values.to(work)
    heads, group, count, _ = q.shape
    rows = max(1, TILE_ELEMENTS // max(1, heads * group * keys.shape[1]))
    keeps_graph = torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad)
    outs: list[Attended] = []
    for a in range(0, count, rows):
        tile = (queries[:, :, a : a + rows], keys, values, None if mask is None else mask[a : a + rows], scores)
        if keeps_graph:
            outs.append(checkpoint(_attend_tile, *tile, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(_attend_tile(*tile))
    out, lse = join_attended(outs, 2)
    return out.to(q.dtype), lse


def _attend_tile(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scores: Scores
) -> Attended:
    heads, group, count, size = q.shape
    products = q.reshape(heads, group * count, size) @ keys.mT  # [Hg, G*T, N]: GQA without repeating KV
    s = scores.capped(products).view(heads, group, count, -1)
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    out = (s.softmax(-1).view(heads, group * count, -1) @ values).view(heads, group, count, -1)
    if scores.sinks is None and not scores.wants_lse:
        return out, None
    lse = s.logsumexp(-1)  # [Hg, G, T]
    return scores.add_sinks(out, lse), lse if scores.wants_lse else None
