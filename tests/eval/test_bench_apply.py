"""`moa bench apply` measures both sides on the same tokens, leaves models as they were, and writes what it measured."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from moa.eval import bench_apply
from moa.eval.apply_report import write_report
from moa.eval.bench_apply import ATTENTION, DENSE, HALF_B, QUARTER, Row, Shape, break_even_tokens

DECODE = Row("a", QUARTER, "decode", 256, 1, 2e-3, 1e-3, 2e-3, 1e-3, 0.5, 0.5, 0.5, 4096, 1024)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models in place of three large ones."""

    def make() -> object:
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        return bench_apply._random(**sizes)

    both = (Shape(HALF_B, "first", 300, make), Shape(ATTENTION, "second", 600, make))
    monkeypatch.setattr(bench_apply, "shapes", lambda longest: both)
    monkeypatch.setattr("moa.eval.apply_report.shapes", lambda longest: both)


def test_every_model_is_measured_up_to_its_longest_text(small: None, tmp_path: Path) -> None:
    seen = []
    rows = bench_apply.bench_apply([300, 600], 1, lambda *at: seen.append(at))
    kinds = [(row.model, row.plan, row.kind, row.tokens) for row in rows]
    assert kinds == [
        (model, plan, kind, n)
        for model, lengths in ((HALF_B, (300,)), (ATTENTION, (300, 600)))
        for plan in (DENSE, QUARTER)
        for n in lengths
        for kind in ("prefill", "decode")
    ]
    assert seen[-1] == ("attached models", 6, 6)
    held = 2 * 2 * 2 * 16 * 4  # bytes of a token: keys and values, 2 layers, 2 heads of 16 in float32
    for row in rows:
        assert row.stock_kv_bytes == held * (row.tokens + 1 + bench_apply.STEPS_PER_TURN)
        kept = row.moa_kv_bytes / row.stock_kv_bytes
        assert kept == pytest.approx(1.0 if row.plan == DENSE else max(0.25, 128 / row.tokens), rel=0.05)
        assert row.turns == (1 if row.kind == "prefill" else bench_apply.STEPS_PER_TURN)
        assert min(row.stock_s, row.moa_s, row.ratio_low) > 0
    write_report(rows, tmp_path)
    with (tmp_path / "apply.csv").open() as file:
        assert [(r["model"], int(r["tokens"])) for r in csv.DictReader(file)] == [(r.model, r.tokens) for r in rows]
    page = (tmp_path / "README.md").read_text()
    assert "second" in page
    assert "100." in page


def test_both_sides_see_the_same_tokens_and_the_model_is_left_dense(small: None, monkeypatch) -> None:
    model = bench_apply._random(hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    before, runs = sorted(vars(model)), []
    stock = bench_apply._Side._timed

    def timed(side, model, tokens):
        taken = stock(side, model, tokens)
        runs.append((side.is_stock, model.config._attn_implementation, tokens.tolist(), side.token.tolist()))
        return taken

    monkeypatch.setattr(bench_apply._Side, "_timed", timed)
    monkeypatch.setattr(bench_apply, "shapes", lambda longest: (Shape("m", "", 300, lambda: model),))
    bench_apply.bench_apply([300], 1, lambda *at: None)
    assert {(is_stock, name) for is_stock, name, *_ in runs} == {(True, "sdpa"), (False, "moa")}
    dense = runs[: len(runs) // 2]
    sides = [[run[2:] for run in dense if run[0] is side] for side in (True, False)]
    assert sides[0] == sides[1], "a dense plan says what the stock model says"
    assert sorted(vars(model)) == before
    assert model.config._attn_implementation == "sdpa"


def test_break_even_is_where_no_longer_text_is_slower() -> None:
    rows = [replace(DECODE, tokens=n, ratio=r) for n, r in ((256, 1.2), (1024, 0.9), (4096, 1.1), (16384, 0.5))]
    assert break_even_tokens(rows, "a") == 16384
    assert break_even_tokens([replace(DECODE, ratio=1.1)], "a") is None
    assert break_even_tokens([replace(DECODE, ratio=0.5, plan=DENSE)], "a") is None


def test_the_page_names_what_misses_the_target(small: None, tmp_path: Path) -> None:
    write_report([replace(DECODE, model=HALF_B, plan=DENSE, ratio=1.25), replace(DECODE, model=HALF_B)], tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "0 of 1 cases. More: 0.5B decode at 256: 25 %." in page
    assert "25.0 %" in page
