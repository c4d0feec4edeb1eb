"""The oracle: attention under spans with an explicit mask, all keys kept. Accuracy only: saves no memory, no time."""

from __future__ import annotations

import torch

from moa.kernels.batch import Batch, Slice
from moa.kernels.memory import KVMemory, LayerState, SequenceState
from moa.kernels.scores import Attended, Scores, lse_dtype
from moa.kernels.store import Store


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    window_starts: torch.Tensor,
    sink_tokens: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    native_window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries at any positions over keys 0..N-1, in float32 (float64 if `q` is).

    Args:
        q: queries [T, HQ, D].
        k: keys [N, HKV, D].
        v: values [N, HKV, D].
        positions: absolute position of each query, int64 [T].
        window_starts: `lo(p)` per KV head and query, int64 [HKV, T].
        sink_tokens: first tokens that every query sees.
        scale: factor on the scores; 1/sqrt(D) by default.
        softcap: bound on the scores.
        sinks: learned logit per query head that takes its share of the softmax, [HQ].
        native_window: the layer's own sliding window in tokens.

    Returns:
        Output [T, HQ, D] in `q`'s dtype and log-sum-exp over the keys, [T, HQ]; a query that sees nothing gives 0 and -inf.
    """
    (T, HQ, D), (N, HKV, _) = q.shape, k.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = torch.arange(N, device=q.device)  # [N]
    p = positions[:, None]  # [T, 1]
    visible = (keys < sink_tokens) | (keys >= window_starts[:, :, None])  # [HKV, T, N]
    visible = visible & (keys <= p)
    if native_window is not None:
        visible = visible & (p - keys < native_window)
    grouped = q.to(work).view(T, HKV, HQ // HKV, D)
    scores = torch.einsum("thgd,nhd->hgtn", grouped, k.to(work)) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))  # [HKV, G, T, N]
    lse = scores.logsumexp(-1)  # [HKV, G, T]
    total = lse if sinks is None else lse.logaddexp(sinks.to(work).view(HKV, -1, 1))  # [HKV, G, T]
    weights = (scores - total.clamp_min(torch.finfo(work).min)[..., None]).exp()  # an empty row gives 0, never NaN
    out = torch.einsum("hgtn,nhd->thgd", weights, v.to(work))
    return out.reshape(T, HQ, D).to(q.dtype), lse.permute(2, 0, 1).reshape(T, HQ)


class ReferenceMemory(KVMemory):
    """Keeps every key and value of every head: accuracy only, saves no memory."""

    backend = "reference"

    def stored_tokens(self, sequence: int, layer: int) -> list[int]:
        """Tokens stored, per KV head: all of them."""
        return [self.length(sequence, layer)] * self.rules.alpha.shape[1]

    def _new_state(self, pinned_tokens: int | None) -> SequenceState:
        layers = [LayerState(x.groups, [Store(self.bytes, 0, keeps_order=True)]) for x in self.table.layers]
        return SequenceState(layers, len(layers), pinned_tokens)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: ReferenceMemory,
    layer: int,
    batch: Batch,
    scores: Scores,
) -> Attended:
    """Attend over (all keys so far + this step's), then keep everything; see `moa.kernels.dispatch.attend`."""
    out = torch.zeros_like(q)  # [T, HQ, D]
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=lse_dtype(q.dtype))  # [T, HQ]
    for item in batch.slices:
        part = slice(item.offset, item.offset + item.tokens)
        out[part], lse[part] = _attend_slice(q, k, v, kv, layer, item, scores)
    return out, lse if scores.wants_lse else None


def _attend_slice(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: ReferenceMemory, layer: int, item: Slice, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    state, part = kv.state(item.sequence), slice(item.offset, item.offset + item.tokens)
    held = state.layers[layer].stores[0]
    keys, values = k[part], v[part]  # [T, HKV, D]
    new = keys.detach().transpose(0, 1), values.detach().transpose(0, 1)  # [HKV, T, D]
    if len(held):
        past = held.live().transpose(1, 2)  # [2, N, HKV, D]
        keys, values = torch.cat((past[0], keys)), torch.cat((past[1], values))  # [N, HKV, D]
    held.append(*new)
    state.lengths[layer] += item.tokens
    positions = torch.arange(item.position, item.position + item.tokens)  # [T]
    starts = torch.from_numpy(kv.rules.window_start(positions.numpy(), state.pinned_tokens)[layer])  # [HKV, T]
    native = kv.table.native_window(kv.table.layers[layer].groups[0].rule)
    return reference_attention(
        q[part],
        keys,
        values,
        positions.to(q.device),
        starts.to(q.device),
        kv.rules.sink_tokens,
        scale=scores.scale,
        softcap=scores.softcap,
        sinks=scores.sinks,
        native_window=native,
    )
