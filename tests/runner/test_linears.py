"""Linear layers by oneDNN: the same numbers, only where they are faster, and gone when the engine closes."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moa.kernels.products import has_onednn
from moa.runner import linears
from moa.runner.packed import PackedModel

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this processor's products are left to torch")


def attached(module: nn.Module) -> ExitStack:
    undo = ExitStack()
    linears.attach(module, undo)
    return undo


@needs_onednn
@given(
    rows=st.integers(0, 70),
    inner=st.sampled_from([1, 33, 256, 768]),
    outer=st.sampled_from([1, 100, 704, 1024]),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_the_products_are_those_of_torch(rows, inner, outer, bias, strided) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(inner, outer, bias)
    x = torch.randn(1, rows, inner * (1 + strided))[..., :: 1 + strided]
    with attached(layer), torch.inference_mode():
        assert "forward" in vars(layer)
        out = layer(x)
        torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias), atol=1e-4, rtol=1e-4)
        assert out.shape == (1, rows, outer)


@needs_onednn
def test_large_products_go_to_onednn_and_small_ones_do_not(monkeypatch) -> None:
    called = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: called.append(given) or real(*given))
    small, large = nn.Linear(64, 64), nn.Linear(1024, 1024)
    with attached(nn.ModuleList([small, large])), torch.inference_mode():
        small(torch.zeros(1, 2, 64))
        assert not called
        large(torch.zeros(1, 1, 1024))
        assert len(called) == 1
        small(torch.zeros(1, 512, 64))
        assert len(called) == 2


def test_what_is_not_plain_is_left_alone() -> None:
    class Own(nn.Linear):
        pass

    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    theirs = replaced.forward
    layers = nn.ModuleList([Own(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), replaced])
    with attached(layers):
        assert "forward" not in vars(layers[0])
        assert "forward" not in vars(layers[1])
        assert replaced.forward is theirs
    assert replaced.forward is theirs


@needs_onednn
def test_gradients_and_other_dtypes_still_work() -> None:
    layer = nn.Linear(1024, 1024)
    with attached(layer):
        x = torch.randn(1, 8, 1024, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        layer.double()
        with torch.inference_mode():
            assert layer(torch.zeros(1, 8, 1024, dtype=torch.float64)).dtype == torch.float64


def test_a_model_is_left_as_it_was(model) -> None:
    with PackedModel(model):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


@given(tokens=st.integers(0, 1 << 18))
def test_rows_are_filled_up_by_a_sixteenth_at_most(tokens) -> None:
    padded = linears.padded_tokens(tokens, CPU)
    assert tokens <= padded <= tokens * 17 / 16 + 1
    assert linears.padded_tokens(padded, CPU) == padded


def test_few_lengths_are_compiled_in_steps_of_up_to_a_thousand() -> None:
    assert len({linears.padded_tokens(tokens, CPU) for tokens in range(1, 1025)}) <= (112 if has_onednn() else 1024)
