"""The log-sum-exp that attend() returns on request: over the keys alone, equal to float64, -inf where nothing is seen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moa.kernels.batch import Batch, Slice
from moa.kernels.dispatch import attend, new_memory
from moa.kernels.reference import reference_attention

TOKENS, PAIRS = 171, [[(20, 0.0), (0, 0.5), (20, 0.0)]]
STEPS = [[(0, 90, 0)], [(0, 1, 90), (1, 1, 0)], [(1, 130, 1), (0, 79, 91)], [(1, 3, 131), (0, 1, 170)]]
SCORES = [{}, {"softcap": 2.0}, {"sinks": torch.tensor([3.0, -1, 0, 9, 2, -5])}, {"softcap": 1.0, "scale": 0.3}]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("native", [None, 7])
@pytest.mark.parametrize("scores", SCORES, ids=["plain", "capped", "sinks", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_equals_the_float64_reference_in_prefill_and_decode(
    lab: SimpleNamespace,
    backend: str,
    native: int | None,
    scores: dict[str, object],
    dtype: torch.dtype,
    grad: bool,
) -> None:
    rules = lab.make_rules(PAIRS)
    inputs = [lab.make_qkv(TOKENS, 6, 3, 32, i, dtype) for i in range(2)]
    kv, got = new_memory(backend, rules, [native]), torch.full((2, TOKENS, 6), torch.nan, dtype=torch.float64)
    for sequence in range(2):
        kv.add(sequence)
    for parts in STEPS:
        q, k, v = (torch.cat([inputs[s][i][p : p + t] for s, t, p in parts]) for i in range(3))
        out, lse = attend(q.requires_grad_(grad), k, v, kv, 0, Batch.pack(parts), return_lse=True, **scores)
        assert out.dtype == lse.dtype == dtype
        for (sequence, tokens, position), rows in zip(parts, lse.split([t for _, t, _ in parts]), strict=True):
            got[sequence, position : position + tokens] = rows.detach()
    starts = torch.from_numpy(rules.window_start(np.arange(TOKENS))[0])
    for sequence, ends in enumerate([171, 134]):
        q, k, v = (x.double() for x in inputs[sequence])
        _, want = reference_attention(q, k, v, torch.arange(TOKENS), starts, 4, native_window=native, **scores)
        torch.testing.assert_close(got[sequence, :ends], want[:ends], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_is_float32_for_half_precision(lab: SimpleNamespace, backend: str, dtype: torch.dtype) -> None:
    kv = new_memory(backend, rules := lab.make_rules(PAIRS))
    kv.add(0)
    qkv, lses = lab.make_qkv(40, 6, 3, 32, 0, dtype), []
    for start, count in ((0, 39), (39, 1)):
        part = [x[start : start + count] for x in qkv]
        out, lse = attend(*part, kv, 0, Batch.pack([(0, count, start)]), return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        lses.append(lse)
    q, k, v = (x.double() for x in qkv)
    starts = torch.from_numpy(rules.window_start(np.arange(40))[0])
    _, want = reference_attention(q, k, v, torch.arange(40), starts, 4)
    torch.testing.assert_close(torch.cat(lses).double(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_padding_gives_zero_and_minus_infinity(lab: SimpleNamespace, backend: str) -> None:
    kv = new_memory(backend, lab.make_rules(PAIRS))
    kv.add(0)
    out, lse = attend(*lab.make_qkv(9, 6, 3, 32, 0), kv, 0, Batch((Slice(0, 2, 5, 0),)), return_lse=True)
    padding = torch.tensor([0, 1, 7, 8])
    assert out[padding].eq(0).all()
    assert lse[padding].isneginf().all()
    assert lse[2:7].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_step_without_slices_is_all_padding(lab: SimpleNamespace, backend: str, tokens: int) -> None:
    kv = new_memory(backend, lab.make_rules(PAIRS))
    out, lse = attend(*lab.make_qkv(tokens, 6, 3, 32, 0), kv, 0, Batch(()), return_lse=True)
    assert out.shape == (tokens, 6, 32)
    assert lse.shape == (tokens, 6)
    assert out.eq(0).all()
    assert lse.isneginf().all()


@pytest.mark.parametrize("scores", SCORES, ids=["plain", "capped", "sinks", "scaled"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_asking_for_it_changes_no_output(lab: SimpleNamespace, backend: str, scores: dict[str, object]) -> None:
    qkv, outs = lab.make_qkv(140, 6, 3, 32, 0), []
    for wants in (False, True):
        kv = new_memory(backend, lab.make_rules(PAIRS))
        kv.add(0)
        prefill = attend(*(x[:139] for x in qkv), kv, 0, Batch.pack([(0, 139, 0)]), return_lse=wants, **scores)
        decode = attend(*(x[139:] for x in qkv), kv, 0, Batch.pack([(0, 1, 139)]), return_lse=wants, **scores)
        outs.append(torch.cat([prefill[0], decode[0]] if wants else [prefill, decode]))
    torch.testing.assert_close(*outs)
