"""The sweep in PyTorch: exact attention tile by tile, and a backward pass that also sums up what every span would lose.

Memory grows with N, never with N x N: a tile of [H, rows, keys] fits in a core's cache. Keys are taken in reverse order,
so that running sums along a tile start at the diagonal: what a short span keeps may be tiny beside what it drops, and a
difference of long sums would lose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moa.profile.sweep import LEAST_MASS, Estimator, Scores, SpanGrid

# Rows (of all query heads of a KV head) and keys of a tile per CPU core; measured best among 128 to 1,024 (1 MiB of L2).
TILE_ROWS, TILE_KEYS = 512, 256
# Elsewhere, elements of a tile over all heads: enough work for a kernel launch.
TILE_ELEMENTS = 1 << 24


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores) -> tuple[Tensor, Tensor]:
    """Causal attention.

    Args:
        q: [B, HQ, N, D].
        k: [B, HKV, N, D].
        v: [B, HKV, N, D].
        sinks: logits of a virtual key without value, one per query head [HQ] (gpt-oss), or None.
        scores: how scores come about.

    Returns:
        out [B, HQ, N, D] and the log-sum-exp of the scores [B, HQ, N], sinks included, in float32 (float64 for float64).
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = (torch.empty(shape, dtype=work, device=q.device) for shape in (q.shape, q.shape[:3]))
    flat_out, flat_lse = _by_kv_head(out, k), _by_kv_head(lse, k)
    for block in _blocks(q, k, v, sinks, scores):
        for rows in block.row_tiles():
            b_out, b_lse = _forward_rows(block, rows)
            flat_out[block.heads, :, rows] = block.by_query_head(b_out)
            flat_lse[block.heads, :, rows] = block.by_query_head(b_lse)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scores: Scores,
    grid: SpanGrid,
    estimator: Estimator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` and, in the same sweep, what each span would lose.

    Args:
        q, k, v, sinks, scores: as for `forward`.
        out, lse: what it returned.
        d_out: dLoss/dOut [B, HQ, N, D].
        grid: spans and position buckets.
        estimator: "joint", "rows" or "moa"; see `Estimator`.

    Returns:
        dq, dk and dv in the inputs' shapes and dtypes, and the losses float64 [HKV, position buckets, spans]: sums of
        dL_i, with its sign for "joint", over rows, query heads of a KV head, and the batch.
    """
    # contiguous, as parts are written through views
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    flat_dq, flat_dk, flat_dv = _by_kv_head(dq, k), dk.view(-1, *k.shape[2:]), dv.view(-1, *v.shape[2:])
    saved = [_by_kv_head(x, k) for x in (out, lse, d_out)]
    buckets = len(grid.position_edges) - 1
    shape = (k.shape[0] * k.shape[1], buckets, len(grid.spans_tokens))
    losses = torch.zeros(shape, dtype=torch.float64, device=q.device)
    for block in _blocks(q, k, v, sinks, scores):
        b_dk, b_dv = torch.zeros_like(block.k), torch.zeros_like(block.v)
        for rows in block.row_tiles():
            b_out, b_lse, b_do = (x[block.heads, :, rows].flatten(1, 2).to(block.k.dtype) for x in saved)
            b_dq, lost = _backward_rows(block, rows, b_out, b_lse, b_do, b_dk, b_dv, grid, estimator)
            flat_dq[block.heads, :, rows] = block.by_query_head(b_dq).to(q.dtype)
            positions = torch.arange(rows.start, rows.stop, device=q.device)
            per_row = block.by_query_head(lost).double().sum(1)  # [H, T, S]
            losses[block.heads].index_add_(1, grid.bucket(positions), per_row)
        flat_dk[block.heads], flat_dv[block.heads] = b_dk.flip(1).to(k.dtype), b_dv.flip(1).to(v.dtype)
    return dq, dk, dv, losses.view(*k.shape[:2], *shape[1:]).sum(0)


def _by_kv_head(x: Tensor, k: Tensor) -> Tensor:
    """[B, HQ, N, ...] -> [B * HKV, G, N, ...]."""
    return x.reshape(k.shape[0] * k.shape[1], -1, *x.shape[2:])


@dataclass(frozen=True, slots=True)
class _Block:
    """Some KV heads, with their queries as they are and keys and values last token first."""

    heads: slice
    q: Tensor  # [H, G, N, D]
    k: Tensor  # [H, N, D], reversed
    v: Tensor  # [H, N, D], reversed
    sinks: Tensor | None  # [H, G]
    scores: Scores
    starts: Tensor | None  # [H, N], or [1, N] for all
    tile: tuple[int, int]

    @property
    def group(self) -> int:
        return self.q.shape[1]

    def row_tiles(self) -> Iterator[slice]:
        n, step = self.q.shape[2], self.tile[0]
        # on the meta device only memory counts, and two tiles hold as much as any: one lives on while the next is made
        for start in range(max(0, n - 2 * step) if self.q.is_meta else 0, n, step):
            yield slice(start, min(n, start + step))

    def key_tiles(self, rows: slice) -> Iterator[range]:
        """Positions of keys that a row tile attends to, from its diagonal to its oldest key."""
        oldest = self.scores.first_key(rows.start)
        stops = range(rows.stop, oldest, -self.tile[1])
        for stop in stops[:2] if self.q.is_meta else stops:
            yield range(max(oldest, stop - self.tile[1]), stop)

    def columns(self, keys: range) -> slice:
        """Where keys lie in the reversed order."""
        n = self.k.shape[1]
        return slice(n - keys.stop, n - keys.start)

    def by_query_head(self, x: Tensor) -> Tensor:
        """[H, G * T, ...] -> [H, G, T, ...]."""
        return x.view(len(x), self.group, -1, *x.shape[2:])

    def queries(self, rows: slice) -> Tensor:
        """[H, G * T, D]."""
        return self.q[:, :, rows].flatten(1, 2).to(self.k.dtype)

    def sink_logits(self, rows: slice) -> Tensor | None:
        """[H, G * T, 1]."""
        if self.sinks is None:
            return None
        return self.sinks.to(self.k.dtype).repeat_interleave(rows.stop - rows.start, 1)[..., None]


def _blocks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores) -> Iterator[_Block]:
    heads, n, group = k.shape[0] * k.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    if q.device.type in ("cpu", "meta"):
        at_once, keys = min(heads, torch.get_num_threads()), TILE_KEYS
        rows = max(1, min(keys, TILE_ROWS // group))
    else:
        at_once = heads
        rows = keys = max(16, math.isqrt(TILE_ELEMENTS // (heads * group)))
    flat_q, flat_k, flat_v = _by_kv_head(q, k), k.reshape(heads, n, -1), v.reshape(heads, n, -1)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    flat_sinks = None if sinks is None else sinks.view(k.shape[1], group).repeat(k.shape[0], 1)
    starts = scores.starts if scores.attenuation < 1 else None
    if starts is not None and len(starts) > 1:
        starts = starts.repeat(k.shape[0], 1)  # [B * HKV, N]
    for start in range(0, heads, at_once):
        some = slice(start, min(heads, start + at_once))
        yield _Block(
            some,
            flat_q[some],
            flat_k[some].flip(1).to(work),
            flat_v[some].flip(1).to(work),
            None if flat_sinks is None else flat_sinks[some],
            scores,
            starts[some] if starts is not None and len(starts) > 1 else starts,
            (rows, keys),
        )


def _bias(block: _Block, rows: slice, keys: range, like: Tensor) -> Tensor | None:
    """What is added to a tile's scores, broadcastable to [H, G * T, keys, reversed]; None for nothing."""
    scores, starts, window = block.scores, block.starts, block.scores.window_tokens
    hidden = keys.stop - 1 > rows.start or (window is not None and keys.start <= rows.stop - 1 - window)
    if starts is None or keys.start >= int(starts[:, rows.stop - 1].max()) or keys.stop <= scores.sink_tokens:
        if not hidden:
            return None
        starts = None
    shift = math.log(scores.attenuation)
    outside = starts is not None and scores.sink_tokens <= keys.start and keys.stop <= int(starts[:, rows.start].min())
    if outside and not hidden:
        return like.new_full((1, 1), shift)
    p = torch.arange(rows.start, rows.stop, device=like.device)[:, None]  # [T, 1]
    j = torch.arange(keys.stop - 1, keys.start - 1, -1, device=like.device)  # [keys]
    bias = like.new_zeros(1 if starts is None else len(starts), len(p), len(j))  # [H or 1, T, keys]
    if starts is not None:
        bias.masked_fill_((j >= scores.sink_tokens) & (j < starts[:, rows, None].to(like.device)), shift)
    bias.masked_fill_((j > p) if window is None else (j > p) | (j <= p - window), -torch.inf)
    return bias.repeat(1, block.group, 1)


def _scores_into(tile: Tensor, q: Tensor, k: Tensor, offset: Tensor, scores: Scores) -> Tensor | None:
    """Write `cap(scale * q.k) + offset` into a tile [H, R, keys]; returns the cap's slope there, None without a cap."""
    if scores.softcap is None:
        torch.baddbmm(offset.expand_as(tile), q, k.mT, alpha=scores.scale, out=tile)
        return None
    torch.bmm(q, k.mT, out=tile)
    bent = tile.mul_(scores.scale / scores.softcap).tanh_()
    slope = 1 - bent.square()
    torch.add(offset, bent, alpha=scores.softcap, out=tile)
    return slope


def _forward_rows(block: _Block, rows: slice) -> tuple[Tensor, Tensor]:
    """Attention of a row tile by a running softmax: out [H, G * T, D] and log-sum-exp [H, G * T]."""
    q, sink = block.queries(rows), block.sink_logits(rows)
    nothing = q.new_zeros(1, 1)
    top = q.new_full((*q.shape[:2], 1), -torch.inf) if sink is None else sink  # [H, G * T, 1]
    mass = torch.zeros_like(top) if sink is None else torch.ones_like(top)
    out = torch.zeros_like(q)
    for keys in block.key_tiles(rows):
        columns = block.columns(keys)
        p = q.new_empty(*q.shape[:2], len(keys))  # [H, G * T, keys]
        bias = _bias(block, rows, keys, q)
        _scores_into(p, q, block.k[:, columns], nothing if bias is None else bias, block.scores)
        new_top = torch.maximum(top, p.amax(-1, keepdim=True))
        p.sub_(new_top).exp_()
        shrink = (top - new_top).exp_()
        mass = mass.mul_(shrink).add_(p.sum(-1, keepdim=True))
        out.mul_(shrink).baddbmm_(p, block.v[:, columns])
        top = new_top
    return out.div_(mass), (top + mass.log())[..., 0]


def _backward_rows(
    block: _Block,
    rows: slice,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    dk: Tensor,
    dv: Tensor,
    grid: SpanGrid,
    estimator: Estimator,
) -> tuple[Tensor, Tensor]:
    """Add a row tile's share to dk and dv; returns its dq [H, G * T, D] and dL_i for every span [H, G * T, S]."""
    q, scores = block.queries(rows), block.scores
    d, lse = (out * d_out).sum(-1, keepdim=True), lse[..., None]  # each [H, G * T, 1]
    dq = torch.zeros_like(q)
    sums = _SpanSums(block, rows, lse, d, grid, estimator)
    for keys in block.key_tiles(rows):
        columns = block.columns(keys)
        p, ds = pair = q.new_empty(2, *q.shape[:2], len(keys))  # P and P (G - D), each [H, G * T, keys]
        bias = _bias(block, rows, keys, q)
        slope = _scores_into(p, q, block.k[:, columns], -lse if bias is None else bias - lse, scores)
        p.exp_()
        torch.baddbmm(d.expand_as(ds), d_out, block.v[:, columns].mT, beta=-1, out=ds)
        ds.mul_(p)
        sums.add(pair, keys)
        dv[:, columns].baddbmm_(p.mT, d_out)
        if slope is not None:
            ds.mul_(slope)
        dq.baddbmm_(ds, block.k[:, columns], alpha=scores.scale)
        dk[:, columns].baddbmm_(ds.mT, q, alpha=scores.scale)
    return dq, sums.losses()


class _SpanSums:
    """Sums over what each span keeps of a tile of rows, fed one tile of keys at a time."""

    def __init__(
        self, block: _Block, rows: slice, lse: Tensor, d: Tensor, grid: SpanGrid, estimator: Estimator
    ) -> None:
        positions = torch.arange(rows.start, rows.stop)
        self._starts = grid.window_start(positions)  # [S, T]
        oldest = torch.tensor([max(grid.sink_tokens, block.scores.first_key(p)) for p in positions.tolist()])  # [T]
        self._covers = (self._starts <= oldest).mT.repeat(block.group, 1).to(d.device)  # [G * T, S]
        self._first, self._last = self._starts[:, 0].tolist(), self._starts[:, -1].tolist()
        self._group, self._sink_tokens, self._estimator, self._d = block.group, grid.sink_tokens, estimator, d
        always = d.new_zeros(1 if estimator == "moa" else 2, *d.shape)  # [Q, H, G * T, 1]: what every span keeps
        logits = block.sink_logits(rows)
        if logits is not None and estimator != "moa":
            mass = (logits - lse).exp()
            always += torch.stack((mass, -mass * d))
        self._always, self._total = always, torch.zeros_like(always)
        self._window = d.new_zeros(*always.shape[:-1], len(self._first))  # [Q, H, G * T, S]

    def add(self, pair: Tensor, keys: range) -> None:
        """Take in P and P (G - D) [2, H, G * T, keys], the youngest key first."""
        x = _single_key_effects(*pair)[None] if self._estimator == "moa" else pair  # [Q, H, G * T, keys]
        # spans ascend, so starts descend: first those that see none of these keys, then some, then all of them
        seen = sum(keys.stop <= first for first in self._first)
        whole = sum(last > keys.start for last in self._last)
        if seen < whole:
            running = x.cumsum(-1)
            self._window[..., seen:whole] += self._take(running, keys, self._starts[seen:whole])
            total = running[..., -1:]
        else:
            total = x.sum(-1, keepdim=True)
        self._window[..., whole:] += total
        self._total += total
        if keys.start < self._sink_tokens:
            self._always += x[..., -min(len(keys), self._sink_tokens - keys.start) :].sum(-1, keepdim=True)

    def _take(self, running: Tensor, keys: range, starts: Tensor) -> Tensor:
        """Sums over the keys from `starts` [S', T] on, [Q, H, G * T, S']."""
        count = (keys.stop - starts.mT).clamp(0, len(keys)).to(running.device).repeat(self._group, 1)  # [G * T, S']
        index = (count - 1).clamp(min=0).expand(*running.shape[:2], *count.shape)
        return running.gather(-1, index).masked_fill_(count == 0, 0.0)

    def losses(self) -> Tensor:
        """dL_i for every span, [H, G * T, S]; exactly 0 where a span covers all that its row attends to."""
        if self._estimator == "moa":
            return (self._total - self._window - self._always)[0].clamp(min=0).masked_fill_(self._covers, 0.0)
        mass, gain = self._window + self._always
        change = torch.where(mass > LEAST_MASS, gain / mass, -self._d)
        return (change.abs_() if self._estimator == "rows" else change).masked_fill_(self._covers, 0.0)


def _single_key_effects(p: Tensor, ds: Tensor) -> Tensor:
    """|P (G - D)| / (1 - P): what masking each key alone does."""
    return ds.abs() / (1 - p).clamp_(min=torch.finfo(p.dtype).eps)
