"""The embedded backend: plain torch on any device, heads grouped by rule, memory of dropped tokens really freed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moa.kernels.band import Band, Pair, side_by_side
from moa.kernels.banded import banded_attention, way_of
from moa.kernels.batch import Batch
from moa.kernels.layout import SpanTable
from moa.kernels.memory import SequenceState, TorchMemory
from moa.kernels.one_token import attend_token
from moa.kernels.scores import Attended, Scores, join_attended, lse_dtype
from moa.kernels.store import Store

# Keys and values of a slice [2, HKV, T, D], or each [HKV, T, D].
Stacked = torch.Tensor | Pair


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
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    parts: list[Attended] = []
    for item, asking, pair in zip(batch.slices, batch.cut(grouped), _cut_pairs(k, v, batch), strict=True):
        state = kv.state(item.sequence)
        if isinstance(pair, torch.Tensor) and not needs_grad:
            parts.append(_decode(asking, pair, kv, layer, state, scores))
        else:
            parts.append(_prefill(asking, pair, kv, layer, state, scores))
        state.lengths[layer] += item.tokens
    out = batch.join([out for out, _ in parts], grouped, 0.0)
    if not layout.is_sorted:
        out = out.index_select(1, inverse)
    if not scores.wants_lse:
        return out.reshape(T, HQ, D), None
    like = grouped[..., 0].to(lse_dtype(q.dtype))  # [T, HKV, G]
    lse = batch.join([lse for _, lse in parts if lse is not None], like, -torch.inf)
    if not layout.is_sorted:
        lse = lse.index_select(1, inverse)
    return out.reshape(T, HQ, D), lse.reshape(T, HQ)


def _cut_pairs(k: torch.Tensor, v: torch.Tensor, batch: Batch) -> Sequence[Stacked]:
    """Each slice's keys and values; those of a single token in one tensor, which one copy stores."""
    if batch.are_single:
        return batch.cut(torch.stack((k, v)).transpose(1, 2), 2)
    pairs = zip(batch.cut(k.transpose(0, 1), 1), batch.cut(v.transpose(0, 1), 1), strict=True)
    return [torch.stack(pair) if pair[0].shape[1] == 1 else pair for pair in pairs]


def _decode(
    q: torch.Tensor,
    pair: torch.Tensor,
    kv: TorchMemory,
    layer: int,
    state: SequenceState,
    scores: Scores,
) -> Attended:
    """One token, q [1, HKV, G, D], pair [2, HKV, 1, D] in grouped order -> [1, HKV, G, D] and, if wanted, [1, HKV, G].

    What its window has left is dropped first: then the live tokens and itself are what it may see.
    """
    position, table, held = state.lengths[layer], kv.table, state.layers[layer]
    starts = table.starts_at(position, state.pinned_tokens)
    drops = max([starts[rule] for rule in held.rules]) > table.sink_tokens
    if drops:
        held.split()
    kv.path = "spans by views" if drops else "dense by views"
    if held.is_whole:
        return _decode_store(q, pair, held.stores[0], table, held.rules[0], position, starts, scores)
    cuts = zip(*[x.split_with_sizes(held.sizes, 1) for x in (q, pair)], strict=True)
    outs = []
    for group, store, (asking, own) in zip(held.groups, held.stores, cuts, strict=True):
        mine = scores.heads(slice(group.first, group.stop))
        outs.append(_decode_store(asking, own, store, table, group.rule, position, starts, mine))
    return join_attended(outs, 1)


def _decode_store(
    q: torch.Tensor,
    pair: torch.Tensor,
    store: Store,
    table: SpanTable,
    rule: int,
    position: int,
    starts: Sequence[int],
    scores: Scores,
) -> Attended:
    """The same for the heads of one store."""
    hidden = table.sink_start(rule, position)
    if not store.replace_one(pair, starts[rule]):
        _drop(store, starts[rule], hidden, table.sink_tokens)
        store.append_one(pair)
    keys, values = store.live_pair(hidden if store.sinks else 0)  # [1, Hg, n, D]
    return attend_token(q, keys, values, scores)


def _with_past(store: Store, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor) -> Pair:
    """A chunk's keys and values [Hg, T, D] behind those that are stored, where it is stored, too; a view without gradient.

    A text's first tokens are given back as they are, and not stored: most may be dropped at once.
    """
    if not len(store):
        return keys, values
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values)):
        past_keys, past_values = store.live()
        seen = side_by_side((past_keys, past_values), (keys, values))
        store.append(keys.detach(), values.detach())
        return seen
    store.append(keys, values)
    past_keys, past_values = store.live()
    return past_keys, past_values


def _drop(store: Store, window_from: int, hidden_sinks: int, sink_tokens: int) -> None:
    """Forget what no query sees any more whose window begins at `window_from` or later."""
    store.drop(window_from)
    if store.sinks and hidden_sinks == sink_tokens:
        store.drop_sinks()


def _prefill(
    q: torch.Tensor,
    pair: Stacked,
    kv: TorchMemory,
    layer: int,
    state: SequenceState,
    scores: Scores,
) -> Attended:
    """A chunk of one sequence, q [T, HKV, G, D] and pair in grouped order -> [T, HKV, G, D], [T, HKV, G]."""
    position, held, table = state.lengths[layer], state.layers[layer], kv.table
    starts = table.starts(position, q.shape[0], state.pinned_tokens)  # [R, T]
    drops = any(starts[group.rule, -1] > table.sink_tokens for group in held.groups)
    if drops:
        held.split()
    outs = []
    for group, store in held.parts():
        mine = slice(group.first, group.stop)
        asking = q[:, mine].permute(1, 2, 0, 3)  # [Hg, G, T, D]
        keys, values = pair[0][mine], pair[1][mine]  # [Hg, T, D]
        seen, sinks = _with_past(store, keys, values, asking), 0 if store.has_lost_sinks else table.sink_tokens
        band = Band(
            keys=seen[0],
            values=seen[1],
            shift=store.window_from - sinks,
            position=position,
            starts=starts[group.rule],
            sink_tokens=sinks,
            native_window=table.native_window(group.rule),
            scores=scores.heads(mine),
        )
        kv.path = f"{'spans' if drops else 'dense'} by {way_of(asking, band)}"
        outs.append(banded_attention(asking, band))  # [Hg, G, T, D], [Hg, G, T]
        last, end = int(band.starts[-1]), position + q.shape[0]
        if not position:
            store.fill(keys.detach(), values.detach(), last)
        _drop(store, last, table.sink_start(group.rule, end - 1), table.sink_tokens)
        store.trim()
    out, lse = join_attended(outs, 0)  # [HKV, G, T, D], [HKV, G, T]
    return out.permute(2, 0, 1, 3), None if lse is None else lse.permute(2, 0, 1)
