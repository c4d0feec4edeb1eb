"""Peers compute what they say they compute, and the check that stands before timing sees one key too few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask

from moa.eval.gpu import check
from moa.eval.gpu.cases import Case
from moa.eval.gpu.heads import LLAMA_8B
from moa.eval.gpu.inputs import make_inputs, sets_wanted
from moa.eval.gpu.patterns import published, uniform
from moa.eval.gpu.peer_flex import Flex, block_mask
from moa.eval.gpu.peer_sdpa import Sdpa

CPU = torch.device("cpu")
SDPA = Sdpa("SDPA", SDPBackend.MATH, CPU)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("subject", [SDPA, Flex(CPU, compiled=False)], ids=["sdpa", "flex"])
def test_a_peer_computes_its_mask(case, subject) -> None:
    inputs = make_inputs(case, 2, CPU, torch.float32)
    built = subject.build(case, inputs)
    for one, call in zip(inputs, built.calls, strict=True):
        out = built.outputs(call())
        for every_row in (True, False):
            assert check.worst_error(case, one, out, subject.mask, every_row) < check.FLOAT32_TOLERANCE
        wrong = "dense" if subject.mask == "same" else "same"
        assert check.worst_error(case, one, out, wrong, every_row=False) > 0.05


def test_a_lost_key_and_a_nan_are_seen(case) -> None:
    (one,) = make_inputs(case, 1, CPU, torch.float32)
    built = SDPA.build(case, [one])
    out = built.outputs(built.calls[0]())
    position = case.parts[0].cached + case.parts[0].new - 1
    less = replace(one, parts=tuple(replace(p, v=p.v.index_fill(2, torch.tensor([position]), 0)) for p in one.parts))
    assert check.worst_error(case, less, out, "dense", every_row=False) > check.TOLERANCE["bf16"]
    out[0][0, -1, 0, 0] = torch.nan
    assert check.worst_error(case, one, out, "dense", every_row=False) == float("inf")


def test_the_block_mask_is_the_one_that_torch_would_make(case) -> None:
    part = case.parts[0]
    ours = block_mask(case, 0, CPU)
    heads = case.heads.kv_heads if case.kind == "decode" else case.heads.heads
    rows = case.heads.group if case.kind == "decode" else part.new
    stock = create_block_mask(ours.mask_mod, None, heads, rows, part.cached + part.new, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(ours.to_dense(), stock.to_dense())
    # torch takes a block of queries that is not full for one that sees no block in full
    touched = [mask.kv_num_blocks + mask.full_kv_num_blocks for mask in (ours, stock)]
    assert torch.equal(*touched)
    assert (ours.full_kv_num_blocks >= stock.full_kv_num_blocks).all()


def test_refusals_say_why() -> None:
    pattern = published(LLAMA_8B)
    hybrid = Case("hybrid", LLAMA_8B, pattern, 4096, 2, 512, prompts=1)
    chunk = Case("chunk", LLAMA_8B, pattern, 4096, 1, 512)
    fp8 = Case("decode", LLAMA_8B, pattern, 4096, kv="fp8")
    for subject in (SDPA, Flex(CPU)):
        assert subject.refuses(hybrid) == "one length per call"
        assert "8-bit" in subject.refuses(fp8)
        assert subject.refuses(chunk) is None
    assert "cuDNN" in Sdpa("cuDNN", SDPBackend.CUDNN_ATTENTION, CPU).refuses(chunk)


def test_small_cases_are_of_the_same_kind_and_format() -> None:
    for kind in ("prefill", "chunk", "decode", "hybrid"):
        case = Case(kind, LLAMA_8B, published(LLAMA_8B), 8192, 2, 512 if kind != "decode" else 0, prompts=1)
        smalls = check.small_cases(replace(case, kv="int8") if kind == "decode" else case)
        assert smalls
        assert {(c.kind, c.heads, c.kv) for c in smalls} == {(kind, LLAMA_8B, "int8" if kind == "decode" else "bf16")}
        assert max(c.tokens for c in smalls) < 2000


def test_sets_rotate_past_the_cache_in_whole_rounds_of_layers() -> None:
    l2, memory = 60 << 20, 80 << 30
    small = Case("decode", LLAMA_8B, uniform(1.0, LLAMA_8B), 4096, 1)  # 16.8 MB
    assert sets_wanted(small, l2, memory) == 12
    assert sets_wanted(Case("decode", LLAMA_8B, uniform(1.0, LLAMA_8B), 32768, 32), l2, memory) == 1
    rules = Case("prefill", LLAMA_8B, published(LLAMA_8B), 131072)
    assert sets_wanted(rules, l2, memory) == 4
    assert sets_wanted(small, l2, 4 * (17 << 20) * 2) == 2, "never more than a share of the memory"
