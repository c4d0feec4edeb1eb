"""Tiles of explicit scores: lengths are rounded, long rows are cut into pieces, and still every query sees just its keys."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa.kernels import tiles
from moa.kernels.products import has_onednn, rounded_length
from moa.kernels.reference import reference_attention

RAN = pytest.mark.skipif(not has_onednn(), reason="needs oneDNN and AVX-512")


@RAN
@pytest.mark.parametrize("pair", [(0, 1.0), (-40, 0.9), (700, 0.0)], ids=str)
@pytest.mark.parametrize("scores", [{}, {"sinks": torch.tensor([1.0, 8.0])}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("native", [None, 900])
def test_rows_cut_into_pieces_are_whole(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, pair: tuple[int, float], scores: dict, native: int | None
) -> None:
    monkeypatch.setattr(tiles, "TILE_KEYS", 512)
    rules, qkv = lab.make_rules([[pair]]), lab.make_qkv(1337, 2, 1, 32, 0)
    kv = lab.new_torch_memory(rules, native=native)
    out = lab.run_steps(kv, qkv, [600, 700, 37], **scores)
    want = lab.oracle(rules, qkv, native=native, **scores)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


@RAN
@pytest.mark.parametrize("tokens", [2049, 2100, 2176])
def test_a_piece_of_nothing_but_what_lengths_are_rounded_by_adds_nothing(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Lengths round up by more than a piece holds, as they do beyond 131,072 keys."""
    monkeypatch.setattr(tiles, "TILE_KEYS", 128)
    assert rounded_length(2049) - 2049 >= 127
    rules, qkv = lab.make_rules([[(0, 1.0)]]), lab.make_qkv(tokens, 8, 1, 16, 0)
    kv = lab.new_torch_memory(rules)
    out = lab.run_steps(kv, qkv, [2000, tokens - 2000], sinks=torch.arange(8.0))
    assert kv.path == "dense by tiles"
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv, sinks=torch.arange(8.0)), atol=1e-5, rtol=1e-5)


@RAN
@pytest.mark.parametrize("native", [1, 40, 599, 700])
@pytest.mark.parametrize("chunks", [[1400], [590, 20, 790], [1300, 100]], ids=str)
def test_sinks_that_the_layer_s_own_window_has_left_are_no_piece_of_their_own(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, native: int, chunks: list[int]
) -> None:
    """More sinks than a piece holds, of which a query sees few or none."""
    monkeypatch.setattr(tiles, "TILE_KEYS", 256)
    rules, qkv = lab.make_rules([[(650, 0.0)]], sink=600, least=601), lab.make_qkv(1400, 2, 1, 32, 0)
    kv = lab.new_torch_memory(rules, native=native)
    out = lab.run_steps(kv, qkv, chunks)
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv, native=native), atol=1e-5, rtol=1e-5)


@RAN
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("group", "size"), [(1, 64), (2, 80), (4, 96), (7, 128), (8, 256)])
def test_every_dtype_head_size_and_grouping(
    lab: SimpleNamespace, dtype: torch.dtype, tolerance: float, group: int, size: int
) -> None:
    rules, qkv = lab.make_rules([[(0, 0.4), (70, 0.0)]]), lab.make_qkv(301, 2 * group, 2, size, 3, dtype)
    assert tiles.tiles_run(qkv[0]) or dtype != torch.float32
    out = lab.run_steps(lab.new_torch_memory(rules), qkv, [301])
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv), atol=tolerance, rtol=tolerance)


@RAN
def test_the_log_sum_exp_of_pieces_is_that_of_the_row(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_KEYS", 512)
    rules, (q, k, v) = lab.make_rules([[(0, 1.0)]]), lab.make_qkv(1100, 1, 1, 32, 0)
    q = q * 8  # peaked: shares far below the least float32 beside one near 1
    _, lse = lab.attend_all(lab.new_torch_memory(rules), (q, k, v))
    starts = torch.from_numpy(rules.window_start(np.arange(1100))[0])
    _, want = reference_attention(q.double(), k.double(), v.double(), torch.arange(1100), starts, 4)
    torch.testing.assert_close(lse.double(), want, atol=1e-4, rtol=1e-5)


@given(length=st.integers(1, 1 << 20))
def test_rounded_lengths_are_few_and_near(length: int) -> None:
    rounded = rounded_length(length)
    assert length <= rounded <= max(length + 63, length * 17 // 16 + 1)
    assert rounded_length(rounded) == rounded


def test_few_lengths_are_compiled_up_to_a_million() -> None:
    assert len({rounded_length(n) for n in range(1, 1 << 20, 37)}) < 200
