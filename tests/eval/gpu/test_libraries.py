"""FlashAttention and FlashInfer get what they want: checked with stand-ins that compute the same plainly."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from moa.eval.gpu import check, patterns, peer_flash, peer_flashinfer, subject, work
from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import make_inputs

CPU = torch.device("cpu")


def load_fakes():
    spec = importlib.util.spec_from_file_location("fakes", Path(__file__).with_name("fakes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> None:
    fakes = load_fakes()
    monkeypatch.setattr(peer_flash, "import_module", lambda name: fakes.flash_attn)
    monkeypatch.setattr(peer_flashinfer, "import_module", lambda name: fakes.flashinfer)
    monkeypatch.setattr(peer_flashinfer, "WORKSPACE_BYTES", 1)


@pytest.mark.parametrize("mask", ["dense", "equal length"])
@pytest.mark.parametrize("library", ["flash_attn", "flashinfer"])
def test_a_library_computes_its_mask(case, library, mask) -> None:
    peer = (
        peer_flash.FlashAttention("flash_attn", mask)
        if library == "flash_attn"
        else peer_flashinfer.FlashInfer(CPU, mask)
    )
    inputs = make_inputs(case, 2, CPU, torch.float32)
    built = peer.build(case, inputs)
    for one, call in zip(inputs, built.calls, strict=True):
        out = built.outputs(call())
        assert check.worst_error(case, one, out, mask, every_row=True) < check.FLOAT32_TOLERANCE
        other = "dense" if mask == "equal length" else "same"
        assert check.worst_error(case, one, out, other, every_row=True) > 0.05


@pytest.mark.parametrize("tokens", [64, 65, 127, 128])
def test_pages_of_a_decode_hold_every_token(case, tokens) -> None:
    decode = Case("decode", case.heads, patterns.uniform(1.0, case.heads), tokens, 2)
    (one,) = inputs = make_inputs(decode, 1, CPU, torch.float32)
    built = peer_flashinfer.FlashInfer(CPU).build(decode, inputs)
    assert check.worst_error(decode, one, built.outputs(built.calls[0]()), "dense", every_row=True) < 1e-4


def test_pod_computes_both_sides(case) -> None:
    mixed = Case("hybrid", case.heads, case.pattern, 333, 3, 100, prompts=1)
    inputs = make_inputs(mixed, 2, CPU, torch.float32)
    built = peer_flashinfer.FlashInfer(CPU).build(mixed, inputs)
    for one, call in zip(inputs, built.calls, strict=True):
        out = built.outputs(call())
        assert check.worst_error(mixed, one, out, "dense", every_row=True) < check.FLOAT32_TOLERANCE


def test_refusals_say_why(case) -> None:
    dense = Case("decode", case.heads, patterns.uniform(1.0, case.heads), 200)
    for peer in (
        peer_flash.FlashAttention("flash_attn", "equal length"),
        peer_flashinfer.FlashInfer(CPU, "equal length"),
    ):
        assert peer.refuses(dense) == "the plan is dense"
        assert "8-bit" in peer.refuses(Case("decode", case.heads, case.pattern, 200, kv="int8"))
        assert peer.refuses(case) is None
    assert "one prompt" in peer_flashinfer.FlashInfer(CPU).refuses(
        Case("hybrid", case.heads, case.pattern, 333, 3, 100, prompts=2)
    )


def test_a_package_that_is_not_there_or_broken_says_so(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_peer.py").write_text("raise OSError('libcuda.so.1: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert subject.why_not("no_such_peer") == "not installed"
    assert subject.why_not("broken_peer") == "cannot be imported: OSError: libcuda.so.1: cannot open"
    assert subject.why_not("json") is None


def test_work_under_a_mask_is_counted_by_a_mask(case) -> None:
    flops, kv_bytes = work.work_under(case, "equal length")
    pairs, tokens = 0, set()
    part, width = case.parts[0], case.pattern.mean_span(case.tokens)
    for p in range(part.cached, part.cached + part.new):
        keys = range(max(0, p + 1 - width), p + 1)
        pairs, tokens = pairs + len(keys), tokens | set(keys)
    assert flops == pairs * part.sequences * 4 * case.heads.head_dim * case.heads.heads
    assert kv_bytes == len(tokens) * part.sequences * case.heads.kv_heads * 4 * case.heads.head_dim
    assert work.work_under(case, "dense") == (work.dense_flops(case), work.dense_kv_bytes(case))
