"""The oracle itself, against a loop over keys that is too simple to be wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa.kernels.reference import reference_attention
from moa.spans import keep


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -2.0, 5.0, 0.0])])
def test_equals_a_loop_over_keys(lab: SimpleNamespace, softcap: float | None, sinks: torch.Tensor | None) -> None:
    rules = lab.make_rules([[(0, 0.5), (3, 0.0)]], sink=2, least=5)
    q, k, v = (x.double() for x in lab.make_qkv(23, 4, 2, 8, 0))
    out = lab.oracle(rules, (q, k, v), scale=0.7, softcap=softcap, sinks=sinks)
    starts = rules.window_start(np.arange(23))[0]
    for t in range(23):
        for head in range(4):
            h = head // 2
            seen = [j for j in range(23) if keep(t, j, int(starts[h, t]), 2)]
            scores = k[seen, h] @ q[t, head] * 0.7
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            weights = torch.softmax(scores, 0)[: len(seen)]
            torch.testing.assert_close(out[t, head], weights @ v[seen, h])


def test_rows_that_see_nothing_give_zero_and_minus_infinity(lab: SimpleNamespace) -> None:
    q, k, v = lab.make_qkv(2, 2, 1, 8, 0)
    starts = torch.tensor([[1, 0]])
    out, lse = reference_attention(q, k, v, torch.tensor([0, 1]), starts, 0)
    assert out[0].eq(0).all()
    assert lse[0].isneginf().all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


@given(scale=st.floats(0.01, 3))
def test_log_sum_exp_is_of_the_visible_scores(lab: SimpleNamespace, scale: float) -> None:
    q, k, v = lab.make_qkv(5, 3, 3, 8, 1, torch.float64)
    _, lse = reference_attention(q, k, v, torch.arange(5), torch.zeros(3, 5, dtype=torch.int64), 0, scale=scale)
    scores = torch.einsum("thd,nhd->thn", q, k) * scale
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[:, None]
    torch.testing.assert_close(lse, scores.masked_fill(~causal, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_the_dtype(lab: SimpleNamespace, dtype: torch.dtype) -> None:
    q, k, v = lab.make_qkv(3, 2, 1, 8, 0, dtype)
    out, lse = reference_attention(q, k, v, torch.arange(3), torch.zeros(1, 3, dtype=torch.int64), 0)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
