"""One token's attention in half precision, widened piece by piece, beside float64."""

from __future__ import annotations

import pytest
import torch

from moa.kernels import one_token
from moa.kernels.scores import Scores


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 333])
def test_pieces_of_any_length_equal_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, group: int, count: int
) -> None:
    monkeypatch.setattr(one_token, "PIECE_NUMBERS", 16 * 3 * 32)
    monkeypatch.setattr(one_token, "MOST_ROWS", {dtype: group})
    monkeypatch.setattr(one_token, "has_tile_registers", lambda: False)
    torch.manual_seed(0)
    q, keys, values = torch.randn(3, group, 32), torch.randn(3, 999, 32), torch.randn(3, 999, 32)
    q, keys, values = (2 * q).to(dtype), keys.to(dtype)[:, 9 : 9 + count], values.to(dtype)[:, 9 : 9 + count]
    assert one_token._is_wide_faster(q[None])
    out = one_token.attend_token(q[None], keys[None], values[None], Scores(0.3))[0][0]
    want = torch.softmax(q.double() @ keys.double().mT * 0.3, -1) @ values.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)


def test_widening_is_for_few_rows_of_halves_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = torch.empty(1, 2, 1, 32, dtype=torch.bfloat16), torch.empty(1, 2, 4, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(one_token, "has_tile_registers", lambda: False)
    assert one_token._is_wide_faster(few)
    assert not one_token._is_wide_faster(many)
    assert not one_token._is_wide_faster(few.float())
    monkeypatch.setattr(one_token, "has_tile_registers", lambda: True)
    assert not one_token._is_wide_faster(few)
