"""The embedded backend: plain torch on any device, heads grouped by rule, memory of dropped tokens really freed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moa.kernels.band import Band
from moa.kernels.banded import banded_attention
from moa.kernels.batch import Batch, Slice
from moa.kernels.layout import LayerLayout
from moa.kernels.memory import SequenceState, TorchMemory
from moa.kernels.scores import Attended, Scores, join_attended, scored_attention


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: TorchMemory,
    layer: int,
    batch: Batch,
    scores: Scores,
) -> Attended:
    """Attend over (live cache + this step's keys), then keep the survivors; see `moa.kernels.dispatch.attend`."""
    (T, HQ, D), HKV = q.shape, k.shape[1]
    layout, scores = kv.table.layers[layer], scores.grouped(HKV)
    grouped = q.view(T, HKV, HQ // HKV, D) if q.is_contiguous() else q.reshape(T, HKV, HQ // HKV, D)
    if not layout.is_sorted:
        order, inverse = layout.indices(q.device)
        grouped, k, v = (x.index_select(1, order) for x in (grouped, k, v))
        scores = scores.heads(order)
    parts = [_attend_slice(grouped, k, v, kv, layer, layout, item, scores) for item in batch.slices]
    out = _assemble([out for out, _ in parts], batch, grouped, 0.0)
    if not layout.is_sorted:
        out = out.index_select(1, inverse)
    if not scores.wants_lse:
        return out.reshape(T, HQ, D), None
    like = grouped[..., 0].to(torch.promote_types(q.dtype, torch.float32))  # [T, HKV, G]
    lse = _assemble([lse for _, lse in parts if lse is not None], batch, like, -torch.inf)
    if not layout.is_sorted:
        lse = lse.index_select(1, inverse)
    return out.reshape(T, HQ, D), lse.reshape(T, HQ)


def _assemble(parts: list[torch.Tensor], batch: Batch, like: torch.Tensor, padding: float) -> torch.Tensor:
    """Each slice's part in its place in a tensor like `like` [T, ...], padding elsewhere."""
    if len(parts) == 1 and parts[0].shape[0] == like.shape[0]:
        return parts[0]
    pieces, end = [], 0
    for part, item in sorted(zip(parts, batch.slices, strict=True), key=lambda pair: pair[1].offset):
        if item.offset > end:
            pieces.append(like.new_full((item.offset - end, *like.shape[1:]), padding))
        pieces.append(part)
        end = item.offset + item.tokens
    if end < like.shape[0] or not pieces:
        pieces.append(like.new_full((like.shape[0] - end, *like.shape[1:]), padding))
    return torch.cat(pieces)


def _attend_slice(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: TorchMemory,
    layer: int,
    layout: LayerLayout,
    item: Slice,
    scores: Scores,
) -> Attended:
    state = kv.state(item.sequence)
    if item.position != state.lengths[layer]:
        raise ValueError(
            f"sequence {item.sequence} has {state.lengths[layer]} tokens in layer {layer}, "
            f"its next slice starts at position {item.position}"
        )
    if item.tokens == 1 and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        out = _decode(q[item.offset], k[item.offset], v[item.offset], kv, layer, layout, state, scores)
    else:
        part = slice(item.offset, item.offset + item.tokens)
        out = _prefill(q[part], k[part], v[part], kv, layer, layout, state, scores)
    state.lengths[layer] += item.tokens
    return out


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: TorchMemory,
    layer: int,
    layout: LayerLayout,
    state: SequenceState,
    scores: Scores,
) -> Attended:
    """One token, q [HKV, G, D], k and v [HKV, D] in grouped order -> [1, HKV, G, D] and, if wanted, [1, HKV, G].

    The token first takes its slot, mostly that of the one it pushes out: then the live slots are what it may see.
    """
    position, table = state.lengths[layer], kv.table
    starts = table.starts_at(position, state.pinned_tokens)
    token, queries, outs = torch.stack((k, v)), q[None], []  # [2, HKV, D], [1, HKV, G, D]
    whole = len(layout.groups) == 1
    for i, group in enumerate(layout.groups):
        mine = token if whole else token[:, group.first : group.stop]  # [2, Hg, D]
        kv.append(state, layer, i, group, mine, starts[group.rule])
        keys, values = state.groups[layer][i].views(table.sink_start(group.rule, position))
        asking = queries if whole else queries[:, group.first : group.stop]  # [1, Hg, G, D]
        outs.append(_ask(asking, keys, values, scores.heads(slice(group.first, group.stop))))
    return join_attended(outs, 1)


def _ask(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> Attended:
    """One token's queries [1, Hg, G, D] over keys and values [1, Hg, n, D], all of them seen: [1, Hg, G, D]."""
    if scores.is_plain and not scores.wants_lse:
        return F.scaled_dot_product_attention(q, keys, values, scale=scores.scale), None
    out, lse = scored_attention(q[0, :, :, None], keys[0], values[0], None, scores)
    return out[None, :, :, 0], None if lse is None else lse[None, :, :, 0]


def _prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: TorchMemory,
    layer: int,
    layout: LayerLayout,
    state: SequenceState,
    scores: Scores,
) -> Attended:
    """A chunk of one sequence, q [T, HKV, G, D], k and v [T, HKV, D] in grouped order -> [T, HKV, G, D], [T, HKV, G]."""
    position, count, table = state.lengths[layer], q.shape[0], kv.table
    starts = table.starts(position, count, state.pinned_tokens)  # [R, T]
    outs = []
    for held, group in zip(state.groups[layer], layout.groups, strict=True):
        mine = slice(group.first, group.stop)
        tokens = torch.stack((k[:, mine], v[:, mine])).transpose(1, 2)  # [2, Hg, T, D]
        if (past := held.in_order(table.sink_tokens)) is not None:
            tokens = torch.cat((past, tokens), 2)  # [2, Hg, N, D]
        band = Band(
            tokens=tokens,
            shift=held.window_from - table.sink_tokens,
            position=position,
            starts=starts[group.rule],
            sink_tokens=table.sink_tokens,
            native_window=table.native_window(group.rule),
            scores=scores.heads(mine),
        )
        outs.append(banded_attention(q[:, mine].permute(1, 2, 0, 3), band))  # [Hg, G, T, D], [Hg, G, T]
        end, last = position + count, int(band.starts[-1])
        kept = band.join((0, min(end, table.sink_tokens)), (last, end))  # [2, Hg, live, D]
        held.replace(kept, last, kv.capacity(group, end, state.pinned_tokens))
    out, lse = join_attended(outs, 0)  # [HKV, G, T, D], [HKV, G, T]
    return out.permute(2, 0, 1, 3), None if lse is None else lse.permute(2, 0, 1)
