"""Stand-ins for libraries that need a GPU: the same calls, computed plainly, so that what is passed to them is checked."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_left: int = -1) -> torch.Tensor:
    """Causal attention that ends at the last key, [T, HQ, D] over [N, HKV, D]."""
    group, n, t = q.shape[1] // k.shape[1], k.shape[0], q.shape[0]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->htn", q, k) * q.shape[-1] ** -0.5
    p, j = torch.arange(n - t, n)[:, None], torch.arange(n)
    seen = (j <= p) & ((window_left < 0) | (p - j <= window_left))
    return torch.einsum("htn,nhd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    assert causal
    return torch.stack([attention(*each, window_size[0]) for each in zip(q, k, v, strict=True)])


def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, causal):
    parts = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
    return torch.stack([attention(a, k[:n], v[:n]) for a, k, v, n in parts]), "lse"


class Ragged:
    def __init__(self, workspace, layout):
        assert layout == "NHD"

    def plan(self, q_ends, kv_ends, heads, kv_heads, head_dim, *, causal, window_left, q_data_type):
        assert causal
        self.ends, self.window_left = (q_ends.tolist(), kv_ends.tolist()), window_left

    def run(self, q, k, v):
        q_ends, ends = self.ends
        spans = zip(q_ends, q_ends[1:], ends, ends[1:], strict=False)
        return torch.cat([attention(q[a:b], k[c:d], v[c:d], self.window_left) for a, b, c, d in spans])


class Paged:
    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert layout == "HND"

    def plan(self, ends, indices, last, heads, kv_heads, head_dim, page, *, q_data_type, kv_data_type):
        self.table = ends.tolist(), indices, last.tolist(), page

    def run(self, q, cache):
        ends, indices, last, page = self.table
        outs = []
        for i, (a, b) in enumerate(pairwise(ends)):
            n = (b - a - 1) * page + last[i]
            k, v = (x[indices[a:b]].transpose(1, 2).flatten(0, 1)[:n] for x in cache)
            outs.append(attention(q[i : i + 1], k, v))
        return torch.cat(outs)


class Pod(Paged):
    def run(self, q, k, v, q_d, cache, *, causal_p, kv_layout_p):
        assert (causal_p, kv_layout_p) == (True, "NHD")
        return attention(q, k, v), super().run(q_d, cache)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
flashinfer = SimpleNamespace(
    BatchPrefillWithRaggedKVCacheWrapper=Ragged,
    BatchDecodeWithPagedKVCacheWrapper=Paged,
    PODWithPagedKVCacheWrapper=Pod,
)
