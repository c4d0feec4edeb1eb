"""The sweep equals attention and masking by definition: gradients, every span and estimator, ugly sizes, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moa.profile import torch_sweep
from moa.profile.attention import Probe
from moa.profile.reference import attention_rows, span_losses
from moa.profile.sweep import Estimator, Scores, SpanGrid
from moa.spans import ElasticRule, SpanRules

SHAPES = [(1, 1, 1, 4), (2, 4, 2, 5), (1, 7, 1, 8), (1, 6, 3, 3)]  # B, HQ, HKV, D
TILES = [(1, 1), (2, 7), (14, 16), (512, 256)]


def inputs(shape: tuple[int, ...], n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, sink logits and dLoss/dOut."""
    batch, heads, kv_heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, heads, n, size), *[(batch, kv_heads, n, size)] * 2, (heads,), (batch, heads, n, size)]
    return tuple(2 * torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, d_out: Tensor, scores: Scores, grid: SpanGrid, how: Estimator
) -> list[Tensor]:
    """out, dq, dk, dv and losses [HKV, positions, spans], from whole attention matrices and autograd."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    p = attention_rows(q, k, sinks, scores)
    p.retain_grad()
    values = v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = p[..., :-1] @ values
    out.backward(d_out)
    rows = span_losses(p.detach(), p.grad, grid, how)  # [B, HQ, N, S]
    per_head = rows.unflatten(1, (k.shape[1], -1)).sum((0, 2))  # [HKV, N, S]
    losses = torch.zeros(k.shape[1], len(grid.position_edges) - 1, len(grid.spans_tokens), dtype=torch.float64)
    losses.index_add_(1, grid.bucket(torch.arange(q.shape[2])), per_head)
    return [out.detach(), q.grad, k.grad, v.grad, losses]


def by_sweep(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, d_out: Tensor, scores: Scores, grid: SpanGrid, how: Estimator
) -> list[Tensor]:
    out, lse = torch_sweep.forward(q, k, v, sinks, scores)
    return [out, *torch_sweep.backward(q, k, v, sinks, out, lse, d_out, scores, grid, how)]


def scores_for(
    n: int,
    grid: SpanGrid,
    attenuation: float,
    softcap: float | None,
    window: int | None,
    rules: tuple[ElasticRule, ...] = (ElasticRule(0, 0.25),),
) -> Scores:
    probe = Probe(grid, "joint", attenuation, reference(grid, *rules))
    return Scores(
        0.4, softcap, window, attenuation, grid.sink_tokens, probe.reference_starts(0, n) if attenuation < 1 else None
    )


def reference(grid: SpanGrid, *rules: ElasticRule) -> SpanRules:
    """One layer's rules."""
    alpha, beta = np.array([[r.alpha for r in rules]]), np.array([[r.beta_fixed for r in rules]])
    return SpanRules(alpha, beta, grid.sink_tokens, max(grid.spans_tokens[0], grid.sink_tokens + 1))


@given(
    n=st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 41]),
    shape=st.sampled_from(SHAPES),
    tile=st.sampled_from(TILES),
    sink=st.integers(0, 6),
    least=st.integers(1, 20),
    seed=st.integers(0, 1 << 30),
    attenuation=st.sampled_from([1.0, 0.3, 1e-3]),
    softcap=st.sampled_from([None, None, 1.5]),
    window=st.sampled_from([None, None, 1, 5, 16, 40]),
    with_sinks=st.booleans(),
    how=st.sampled_from(["joint", "rows", "moa"]),
    by_head=st.booleans(),
)
def test_a_sweep_is_masking_by_definition(
    n, shape, tile, sink, least, seed, attenuation, softcap, window, with_sinks, how, by_head
) -> None:
    grid = SpanGrid.for_length(n, sink, sink + least, 7)
    q, k, v, sinks, d_out = inputs(shape, n, seed)
    arguments = (q, k, v, sinks if with_sinks else None, d_out)
    rules = tuple(ElasticRule(3 * h, 0.25 * h) for h in range(shape[2])) if by_head else (ElasticRule(0, 0.25),)
    scores = scores_for(n, grid, attenuation, softcap, window, rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sweep, "TILE_ROWS", tile[0])
        patch.setattr(torch_sweep, "TILE_KEYS", tile[1])
        got = by_sweep(*arguments, scores, grid, how)
    for mine, wanted in zip(got, by_definition(*arguments, scores, grid, how), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-9)


def test_spans_beyond_a_native_window_lose_nothing_at_all() -> None:
    n, window = 64, 9
    grid = SpanGrid.for_length(n, 2, 4)
    q, k, v, _, d_out = inputs((1, 2, 1, 8), n, 3, torch.float32)
    for how in get_args(Estimator):
        losses = by_sweep(q, k, v, None, d_out, Scores(0.3, window_tokens=window), grid, how)[-1]  # [1, P, S]
        wide = torch.tensor([span - grid.sink_tokens >= window for span in grid.spans_tokens])
        assert not losses[..., wide].any()
        assert (losses[..., ~wide].abs().sum((0, 1)) > 0).all()


def test_half_precision_inputs_are_swept_in_float32() -> None:
    n = 50
    grid = SpanGrid.for_length(n, 2, 6)
    scores = replace(scores_for(n, grid, 0.05, None, None), scale=0.2)
    arguments = inputs((1, 4, 2, 8), n, 1, torch.bfloat16)
    got, want = (
        by_sweep(*arguments, scores, grid, "joint"),
        by_sweep(*(x.float() for x in arguments), scores, grid, "joint"),
    )
    torch.testing.assert_close(got[-1], want[-1], rtol=0, atol=0)
    for mine, wanted in zip(got[1:4], want[1:4], strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, wanted.bfloat16(), rtol=0, atol=0)


def test_small_kept_shares_do_not_drown_in_what_is_dropped() -> None:
    """A window that holds 1e-9 of a row, in float32, right beside keys that hold all the rest."""
    n, size = 40, 4
    grid = SpanGrid.for_length(n, 0, 4)
    q, k, v, _, d_out = inputs((1, 1, 1, size), n, 2, torch.float32)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[..., 30, 0] = 20.0  # rows from 34 on no longer see it with a span of 4
    want = by_definition(*(x.double() for x in (q, k, v)), None, d_out.double(), Scores(1.0), grid, "joint")[-1]
    got = by_sweep(q, k, v, None, d_out, Scores(1.0), grid, "joint")[-1]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_row_that_keeps_no_mass_stays_finite() -> None:
    n = 24
    grid = SpanGrid.for_length(n, 1, 3)
    q, k, v, _, d_out = inputs((1, 1, 1, 4), n, 0)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[..., 1, 0] = 1e4  # everything on a key that short spans drop
    for how in get_args(Estimator):
        got = by_sweep(q, k, v, None, d_out, Scores(1.0), grid, how)[-1]
        assert got.isfinite().all()
        assert (got[..., 0] != 0).any()
        assert (got[..., -1] == 0).all()


@given(
    n=st.integers(1, 5000), sink=st.integers(0, 100), extra=st.integers(1, 300), n_positions=st.sampled_from([1, 7, 32])
)
def test_the_grid_spans_the_length(n, sink, extra, n_positions) -> None:
    grid = SpanGrid.for_length(n, sink, sink + extra, n_positions)
    assert list(grid.spans_tokens) == sorted(set(grid.spans_tokens))
    assert grid.spans_tokens[-1] == n
    assert grid.spans_tokens[0] == min(n, sink + extra)
    assert list(grid.position_edges) == sorted(set(grid.position_edges))
    assert (grid.position_edges[0], grid.position_edges[-1]) == (0, n)
    start = grid.window_start(torch.arange(n))
    assert start.shape == (len(grid.spans_tokens), n)
    assert (start[-1] <= max(sink, 0)).all() or sink == 0  # the last span covers every row
    assert (start[:-1] >= start[1:]).all()


def test_transposed_batches_get_their_gradients() -> None:
    """As transformers hands them over: [B, N, H, D] in memory."""
    n = 20
    grid = SpanGrid.for_length(n, 2, 4)
    plain = inputs((2, 4, 2, 8), n, 5)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x for x in plain]
    assert not turned[0].is_contiguous()
    for mine, wanted in zip(
        by_sweep(*turned, Scores(0.3), grid, "joint"), by_sweep(*plain, Scores(0.3), grid, "joint"), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
