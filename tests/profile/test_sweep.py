"""The sweep equals masking by definition: every span, both estimators, ugly sizes, float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moa.profile.reference import masked_row_loss, single_key_effects
from moa.profile.sweep import SpanGrid, row_losses


def rows(n: int, seed: int, sharp: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Causal attention rows and gradients, both [2, 3, N, N]."""
    generator = torch.Generator().manual_seed(seed)
    scores = sharp * torch.randn(2, 3, n, n, generator=generator, dtype=dtype)
    p = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return p, torch.randn(2, 3, n, n, generator=generator, dtype=dtype)


def keep_mask(n: int, span: int, sink: int) -> Tensor:
    """The definition in moa/spans.py for a span that does not shrink with the row; [N, N]."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (j <= i) & ((j < sink) | (j >= i + 1 - (span - sink)))


@given(
    n=st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 41]),
    sink=st.integers(0, 6),
    least=st.integers(1, 20),
    seed=st.integers(0, 1 << 30),
    sharp=st.sampled_from([0.0, 1.0, 8.0]),
)
def test_joint_losses_are_those_of_masking(n, sink, least, seed, sharp) -> None:
    p, g = rows(n, seed, sharp)
    grid = SpanGrid.for_length(n, sink, sink + least)
    positions = torch.arange(n)
    got = row_losses(p, g, grid.window_start(positions), positions, sink, "joint")  # [2, 3, S, N]
    assert got.shape == (2, 3, len(grid.spans_tokens), n)
    for i, span in enumerate(grid.spans_tokens):
        if span <= sink:  # the text itself is no longer than the sinks
            assert not got[:, :, i].any()
            continue
        want = masked_row_loss(p, g, keep_mask(n, span, sink)).abs()
        torch.testing.assert_close(got[:, :, i], want, rtol=1e-9, atol=1e-10)


@given(n=st.sampled_from([2, 3, 16, 17, 29]), sink=st.integers(0, 4), seed=st.integers(0, 1 << 30))
def test_the_published_estimator_sums_single_keys(n, sink, seed) -> None:
    p, g = rows(n, seed, 1.0)
    grid = SpanGrid.for_length(n, sink, sink + 1)
    positions = torch.arange(n)
    got = row_losses(p, g, grid.window_start(positions), positions, sink, "moa")
    alone = single_key_effects(p, g).abs()
    for i, span in enumerate(grid.spans_tokens):
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        masked = causal & ~keep_mask(n, max(span, sink + 1), sink)
        want = torch.where(masked, alone, 0).sum(-1)
        torch.testing.assert_close(got[:, :, i], want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("estimator", ["joint", "moa"])
def test_rows_alone_are_rows_together(estimator) -> None:
    n, sink = 37, 4
    p, g = rows(n, 5)
    grid = SpanGrid.for_length(n, sink, 7)
    positions = torch.arange(n)
    whole = row_losses(p, g, grid.window_start(positions), positions, sink, estimator)
    for start, stop in ((0, 1), (1, 18), (18, 37)):
        part = torch.arange(start, stop)
        tile = p[..., start:stop, :stop], g[..., start:stop, :stop]
        got = row_losses(*tile, grid.window_start(part), part, sink, estimator)
        torch.testing.assert_close(got, whole[..., start:stop], rtol=1e-12, atol=1e-12)


def test_a_row_that_keeps_no_mass_stays_finite() -> None:
    n = 24
    p = torch.zeros(1, 1, n, n, dtype=torch.float64)
    p[..., 0, 0] = 1
    p[..., 1:, 1] = 1  # everything on a key that short spans drop
    g = torch.randn(1, 1, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = SpanGrid.for_length(n, 1, 3)
    positions = torch.arange(n)
    for estimator in ("joint", "moa"):
        got = row_losses(p, g, grid.window_start(positions), positions, 1, estimator)
        assert got.isfinite().all()
        assert (got[:, :, -1] == 0).all()


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
