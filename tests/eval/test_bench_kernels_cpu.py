"""The CPU kernel benchmark: equal masks, memory as after a prefill, and rows that say what could not run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from moa.eval.cpu import bench, cases
from moa.eval.cpu.bench import bench_cpu
from moa.eval.cpu.cases import DENSE, FLEX, OURS, PLANS, Case, filled, pairs_ratio, span_rules, subjects
from moa.eval.cpu.report import write_report
from moa.eval.flex_mask import BLOCK, chunk_mask
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory
from moa.spans import SpanRules

SMALL = (Case("prefill", 256, "float32", 32, 2, 1), Case("decode", 256, "bfloat16", 32, 2, 4))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention fails as it does without a C++ compiler; compiling takes half a minute."""

    def call() -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(cases, "compiled_flex", lambda *args: call)


@pytest.fixture
def shares() -> SpanRules:
    return span_rules((0.3, 0.7), 2)


def test_flex_gets_exactly_the_plans_mask(shares: SpanRules) -> None:
    n = 8 * BLOCK
    starts = torch.from_numpy(shares.window_start(np.arange(n))[0])[:, :, None]  # [HKV, N, 1]
    j, p = torch.arange(n), torch.arange(n)[:, None]
    seen = (j <= p) & ((j >= starts) | (j < shares.sink_tokens))  # [HKV, N, N]
    blocks = seen.view(2, n // BLOCK, BLOCK, n // BLOCK, BLOCK).transpose(2, 3).flatten(3)
    mask = chunk_mask(shares.window_start(np.arange(n))[0], 0, shares.sink_tokens)
    for counts, listed, want in (
        (mask.full_kv_num_blocks, mask.full_kv_indices, blocks.all(-1)),
        (mask.kv_num_blocks, mask.kv_indices, blocks.any(-1) & ~blocks.all(-1)),
    ):
        got = torch.zeros_like(want)
        for h, row in np.ndindex(*want.shape[:2]):
            got[h, row, listed[0, h, row, : counts[0, h, row]].long()] = True
        assert torch.equal(got, want)
    heads = torch.arange(2)[:, None, None]
    assert torch.equal(mask.mask_mod(torch.zeros(()), heads, p, j), seen)


def test_filled_memory_goes_on_as_after_a_prefill(shares: SpanRules) -> None:
    q, k, v = torch.randn(300, 2, 32), torch.randn(301, 2, 32), torch.randn(301, 2, 32)
    real = new_memory("torch", shares)
    real.add(0)
    attend(q, k[:300], v[:300], real, 0, Batch.pack([(0, 300, 0)]))
    made, last = filled(shares, k[:300].transpose(0, 1), v[:300].transpose(0, 1)), Batch.pack([(0, 1, 300)])
    assert made.stored_tokens(0, 0) == real.stored_tokens(0, 0)
    outs = [attend(q[:1], k[300:], v[300:], kv, 0, last) for kv in (real, made)]
    torch.testing.assert_close(*outs)


def test_a_plans_part_of_pairs_is_counted() -> None:
    assert pairs_ratio(span_rules((1.0, 1.0), 2), 4096) == 1
    assert pairs_ratio(span_rules(PLANS["25 %"], 2), 16384) == pytest.approx(0.25, abs=1e-3)
    assert pairs_ratio(span_rules(PLANS["two rules, 25 %"], 2), 16384) == pytest.approx(0.25, abs=2e-3)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_subject_of_ours_names_its_path(case: Case) -> None:
    for subject in subjects(case):
        if subject.name == OURS:
            subject.call()
            assert subject.path().split()[0] == ("dense" if subject.plan == "100 %" else "spans")


@pytest.mark.usefixtures("no_compiler")
def test_a_peer_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "cases", lambda tokens: iter(SMALL))
    rows, grown = bench_cpu(256, 2, lambda *stage: None)
    assert [row.reason for row in rows if row.subject == FLEX] == ["RuntimeError: no C++ compiler"]
    assert all(row.dense_over_it for row in rows if row.subject == OURS)
    assert [g.tokens for g in grown] == [256, 512, 1024]
    write_report(rows, grown, tmp_path)
    with (tmp_path / "kernels.csv").open(encoding="utf-8") as file:
        assert [line["subject"] for line in csv.DictReader(file)] == [row.subject for row in rows]
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "no C++ compiler" in page
    assert "long trace" not in page
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert {row.subject for row in rows} == {DENSE, FLEX, OURS}
