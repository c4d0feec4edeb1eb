"""The Triton sweep, in Triton's interpreter, equals the torch sweep in float64: gradients and the losses of every span."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moa.errors import ModelError
from moa.kernels.paged.tiles import Tile
from moa.profile import attention, torch_sweep
from moa.profile.attention import Probe
from moa.profile.sweep import Estimator, Scores, SpanGrid
from moa.profile.triton_tiles import Tiles, tiles_for
from moa.spans import SpanRules

SINK, LEAST = 3, 6
NAMES = ("out", "lse", "dq", "dk", "dv", "losses")


@pytest.fixture(scope="session")
def triton_sweep() -> ModuleType:
    """The backend; `tests/conftest.py` has its kernels interpreted."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    return importlib.import_module("moa.profile.triton_sweep")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that was not written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tiles(rows: int = 16, keys: int = 16) -> Tiles:
    return Tiles(*[Tile(rows, keys, 4, 1)] * 3)


def inputs(n: int, hq: int = 2, hkv: int = 1, d: int = 16, batch: int = 1, dtype: torch.dtype = torch.float32) -> list:
    """q, k, v, sink logits, dLoss/dOut; rows and columns behind them in memory are NaN."""
    generator = torch.Generator().manual_seed(n)

    def padded(heads: int) -> Tensor:
        room = torch.full((batch, n + 5, heads, d + 3), torch.nan, dtype=dtype)
        room[:, :n, :, :d] = torch.randn(batch, n, heads, d, generator=generator).to(dtype)
        return room[:, :n, :, :d].transpose(1, 2)

    return [2 * padded(hq), padded(hkv), padded(hkv), torch.randn(hq, generator=generator), padded(hq)]


def scores_for(n: int, **changes: object) -> Scores:
    """A path point at lambda 0.05 as profiling has it."""
    beta = np.array([[1 << 14]])  # a quarter of the text
    reference = SpanRules(np.array([[0]]), beta, SINK, LEAST)
    starts = Probe(SpanGrid.for_length(n, SINK, LEAST), "joint", 0.05, reference).reference_starts(0, n)
    return replace(Scores(0.3, attenuation=0.05, sink_tokens=SINK, starts=starts), **changes)


def few_spans(n: int, buckets: int = 2) -> SpanGrid:
    """The interpreter is slow, above all at edges."""
    spans = [tokens for tokens in (LEAST, 7, 12, 23) if tokens < n]
    return SpanGrid((*spans, n), SpanGrid.for_length(n, SINK, LEAST, buckets).position_edges, SINK)


def run(
    backend: ModuleType, q, k, v, sinks, d_out, scores: Scores, grid: SpanGrid, how: Estimator, *more: Tiles
) -> list:
    out, lse = backend.forward(q, k, v, sinks, scores, *more)
    return [out, lse, *backend.backward(q, k, v, sinks, out, lse, d_out, scores, grid, how, *more)]


def assert_equal_to_torch(
    backend: ModuleType, arguments: list, scores: Scores, grid: SpanGrid, how: Estimator = "rows",
    tile: Tiles | None = None, gradients: float = 5e-6,
) -> None:  # fmt: skip
    """All of it close beside its largest element, and each loss within 1e-3 of itself."""
    got = run(backend, *arguments, scores, grid, how, tile or tiles())
    want = run(torch_sweep, *(None if x is None else x.double().contiguous() for x in arguments), scores, grid, how)
    for name, mine, wanted in zip(NAMES, got, want, strict=True):
        size = wanted.abs().max().item()
        # gradients are zero but for rounding where a row sees one key only
        near = gradients * max(size, 1) if name in ("dq", "dk", "dv") else 5e-6 * size
        assert (mine - wanted).abs().max() <= near, name
    if how != "joint":  # signed sums may cancel
        torch.testing.assert_close(got[-1], want[-1], rtol=1e-3, atol=1e-6 * want[-1].max().item())
    assert not got[-1][want[-1] == 0].any()  # exactly: the span covers all rows of the bucket


@pytest.mark.parametrize("how", ["joint", "rows", "moa"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 29])
def test_ugly_lengths(triton_sweep, n, how) -> None:
    q, k, v, _, d_out = inputs(n)
    grid = SpanGrid.for_length(n, SINK, LEAST, 2)
    assert_equal_to_torch(triton_sweep, [q, k, v, None, d_out], scores_for(n), grid, how)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ({"hq": 7, "hkv": 1, "d": 80}, (16, 16)),  # G no power of two, D padded
        ({"hq": 4, "hkv": 2, "d": 96, "batch": 2}, (32, 16)),
        ({"hq": 2, "hkv": 2, "d": 32}, (16, 32)),
        ({"hq": 1, "hkv": 1, "d": 8}, (32, 32)),
    ],
)
def test_shapes_and_tiles(triton_sweep, shape, tile) -> None:
    n = 19
    q, k, v, _, d_out = inputs(n, **shape)
    assert_equal_to_torch(triton_sweep, [q, k, v, None, d_out], scores_for(n), few_spans(n, 1), tile=tiles(*tile))


@pytest.mark.parametrize(
    ("changes", "with_sinks", "how"),
    [
        ({"attenuation": 1.0, "starts": None}, False, "joint"),
        ({"softcap": 2.0}, False, "joint"),
        ({"softcap": 2.0, "window_tokens": 20}, True, "moa"),
        ({}, True, "joint"),
        ({"window_tokens": 1}, False, "joint"),
        ({"window_tokens": 16}, False, "moa"),
        ({"window_tokens": 21}, True, "joint"),
    ],
)
def test_terms_of_the_scores(triton_sweep, changes, with_sinks, how) -> None:
    n = 41
    q, k, v, sinks, d_out = inputs(n)
    arguments = [q, k, v, sinks if with_sinks else None, d_out]
    assert_equal_to_torch(triton_sweep, arguments, scores_for(n, **changes), few_spans(n), how)


@pytest.mark.parametrize(("attenuation", "how"), [(0.05, "rows"), (0.05, "moa"), (1.0, "joint")])
def test_runs_without_masks(triton_sweep, how, attenuation) -> None:
    """Few spans, so that most tiles have no edge: between them, attenuated ones, and ones past the last."""
    n = 109
    q, k, v, _, d_out = inputs(n, hq=1)
    grid = SpanGrid((SINK + 4, SINK + 60, n), (0, 50, n), SINK)
    starts = (torch.arange(1, n + 1) - 50).clamp(min=0)[None]
    scores = scores_for(n, attenuation=attenuation, starts=starts)
    assert_equal_to_torch(triton_sweep, [q, k, v, None, d_out], scores, grid, how)


def test_many_sinks_and_buckets_of_a_row(triton_sweep) -> None:
    n, sink = 29, 18
    q, k, v, _, d_out = inputs(n, hq=1)
    grid = SpanGrid((sink + 1, sink + 2, sink + 5, n), (*range(0, n, 4), n), sink)
    scores = scores_for(n, sink_tokens=sink, starts=(torch.arange(1, n + 1) - 2).clamp(min=sink)[None])
    assert_equal_to_torch(triton_sweep, [q, k, v, None, d_out], scores, grid)


def test_half_precision(triton_sweep) -> None:
    """Losses as exact as in float32: only what multiplies K and Q into gradients is rounded."""
    n = 37
    q, k, v, sinks, d_out = inputs(n, dtype=torch.float16)
    assert_equal_to_torch(triton_sweep, [q, k, v, sinks, d_out], scores_for(n), few_spans(n), gradients=1e-3)
    got = run(
        triton_sweep, *(x[:, :, :2] for x in (q, k, v)), None, d_out[:, :, :2], scores_for(2), few_spans(2), "moa"
    )
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.float16] * 3 + [torch.float64]


def test_a_row_that_keeps_no_mass_loses_all(triton_sweep) -> None:
    n = 20
    q, k, v, _, d_out = inputs(n, hq=1)
    q[..., 0], k[..., 0] = 40.0, 0.0
    k[:, :, 1, 0] = 40.0  # all mass on a key that short spans drop: scores of 480 beside about 0
    grid = SpanGrid((2, 4, n), (0, n), 1)
    scores = Scores(0.3, sink_tokens=1)
    assert_equal_to_torch(triton_sweep, [q, k, v, None, d_out], scores, grid, gradients=1e-3)


def test_every_kv_head_has_a_reference_of_its_own(triton_sweep) -> None:
    n = 35
    q, k, v, _, d_out = inputs(n, hq=4, hkv=2)
    rows = torch.arange(1, n + 1)
    scores = scores_for(n, starts=torch.stack((rows - 5, rows - 14)).clamp(min=SINK))
    assert_equal_to_torch(triton_sweep, [q, k, v, None, d_out], scores, few_spans(n))


@pytest.mark.parametrize("how", ["joint", "moa"])
def test_one_key_more_or_less_is_seen(triton_sweep, how) -> None:
    """The comparison above is worth something: every edge moved by one, up or down, is far outside its tolerance."""
    n = 37
    q, k, v, _, d_out = inputs(n)
    spans = (8, 16, 27, n)
    got = run(triton_sweep, q, k, v, None, d_out, scores_for(n), SpanGrid(spans, (0, n), SINK), how, tiles())
    for step in (-1, 1):
        moved = SpanGrid((*(tokens + step for tokens in spans[:-1]), n), (0, n), SINK)
        exact = [x.double() for x in (q, k, v)]
        want = run(torch_sweep, *exact, None, d_out.double(), scores_for(n), moved, how)
        apart = (got[-1] - want[-1]).abs() / want[-1].abs()
        assert (apart[..., :-1] > 5e-3).all()


def test_a_head_beyond_two_to_the_31_elements(triton_sweep, tmp_path: Path) -> None:
    """A sparse file stands for a text whose rows lie 4 Mi elements apart."""
    n, stride = 530, 1 << 22
    room = torch.from_file(str(tmp_path / "rows"), shared=True, size=n * stride, dtype=torch.float16)
    x = room.as_strided((1, 1, n, 16), (n * stride, n * stride, stride, 1))
    x.copy_(torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(0)))
    near = x.contiguous()
    scores = Scores(0.3, window_tokens=16)
    far, lse = triton_sweep.forward(x, x, x, None, scores, tiles(32, 16))
    want, want_lse = torch_sweep.forward(near, near, near, None, scores)
    torch.testing.assert_close(far, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


def test_a_model_profiles_the_same(triton_sweep, make, monkeypatch) -> None:
    n, model = 14, make.model(dtype=torch.float32)
    grid = SpanGrid.for_length(n, SINK, LEAST, 2)
    reference = SpanRules(np.array([[0]]), np.array([[1 << 14]]), SINK, LEAST)
    tokens = torch.tensor([make.sample(n, 0).token_ids])
    attention.register()
    model.set_attn_implementation(attention.NAME)
    results = []
    for backend in (torch_sweep, triton_sweep):
        monkeypatch.setattr(attention, "backend_for", lambda query, chosen=backend: chosen)
        probe = Probe(grid, "rows", 0.05, reference)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        with attention.probing(probe):
            model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
        results.append((probe, embedded.grad))
    (want, want_grad), (got, got_grad) = results
    assert (want.backends, got.backends) == ({"torch"}, {"triton"})
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-5 * want_grad.abs().max().item())
    for layer, losses in want.losses.items():
        assert losses.max() > 0
        torch.testing.assert_close(got.losses[layer], losses, rtol=1e-3, atol=1e-5 * losses.max().item())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "triton_sweep"),
        ({"device": torch.device("cpu")}, "torch_sweep"),
        ({"dtype": torch.float64}, "torch_sweep"),
        ({"shape": (1, 2, 9, 288)}, "torch_sweep"),
    ],
)
def test_kernels_run_where_they_can(triton_sweep, changes, name) -> None:
    on_gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "shape": (1, 2, 9, 128)}
    query = SimpleNamespace(**(on_gpu | changes))
    assert attention.backend_for(query).__name__ == f"moa.profile.{name}"


@given(n=st.integers(1, 700), rows=st.sampled_from([1, 16, 64]), positions=st.integers(1, 40))
def test_row_blocks_cover_the_text_bucket_by_bucket(triton_sweep, n, rows, positions) -> None:
    grid = SpanGrid.for_length(n, SINK, LEAST, positions)
    starts, buckets = triton_sweep.row_blocks(grid, n, rows)
    sizes = starts.diff()
    assert (starts[0].item(), starts[-1].item()) == (0, n)
    assert 1 <= sizes.min() <= sizes.max() <= rows
    by_row = buckets.repeat_interleave(sizes)
    assert torch.equal(by_row, grid.bucket(torch.arange(n)))


def test_what_the_kernels_do_not_take_is_refused(triton_sweep) -> None:
    q, k, v, _, _ = inputs(4)
    for wrong in (
        [q.double(), k.double(), v.double()],
        [q, k.half(), v],
        [q, k[..., :8], v[..., :8]],
        [q, k, v[:, :, :3]],
    ):
        with pytest.raises(ModelError, match="Triton backend"):
            triton_sweep.forward(*wrong, None, Scores(1.0))
    with pytest.raises(ModelError, match="head_dim up to 256"):
        tiles_for(288, 2, 227)
    with pytest.raises(ModelError, match="48 KiB"):
        tiles_for(128, 2, 48)
