"""The page says what was measured, what was not, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moa.errors import InputError
from moa.eval.gpu import report
from moa.eval.gpu.machine import Machine, Rates
from moa.eval.gpu.report import Run, load_runs, page, save_runs, write_report
from moa.eval.gpu.rows import Row
from moa.eval.gpu.targets import OURS

MACHINE = Machine("GPU X", "9.0", 132, 60 << 20, 140 << 30, "580.1", "13.0", "3.12.1", (("torch", "2.11.0"),))
RUN = Run("2026-11-21T10:00:00+00:00", "moa bench kernels -o out", MACHINE, Rates(4.3e12, 790e12, 1.9e-6))
OK = Row(
    "prefill Llama-3-8B dense, 8,192 tokens x 1, bf16", "prefill", "Llama-3-8B", "dense", False, 8192, 1, 0, 0, "bf16", OURS,
    "same", "ok", median_us=1200.0, low_us=1190.0, high_us=1215.0, flops=5.5e11, dense_flops=5.5e11, kv_bytes=3.3e7,
    dense_kv_bytes=3.3e7, tflops=460.0, gb_per_s=28.0, of_matmul_ratio=0.58, of_copy_ratio=0.0065,
)  # fmt: skip
PEER = replace(OK, subject="SDPA flash", mask="dense", median_us=1500.0)


def test_the_page_has_figures_conditions_and_what_is_missing() -> None:
    rows = [
        OK,
        PEER,
        replace(PEER, subject="flex_attention", mask="same", status="failed", reason="it broke", median_us=None),
        replace(PEER, subject="FlashInfer", status="missing", reason="not installed", median_us=None),
    ]
    text = page(rows, [RUN], 150)
    for part in (
        "GPU X, compute capability 9.0, 132 multiprocessors, L2 60.00 MiB",
        "driver 580.1, CUDA 13.0, Python 3.12.1, torch 2.11.0",
        "copy 4.30 TB/s, matmul 790 TFLOP/s",
        "`moa bench kernels -o out`",
        "cases of the grid with a time of ours: 1 of 150",
        "1,200 (1,190 to 1,215)",
        "FlashInfer, all causal keys: 1 missing (not installed)",
        "it broke",
    ):
        assert part in text, part
    lines = [line for line in text.splitlines() if line.startswith("| prefill Llama")]
    cells = [cell.strip() for cell in lines[0].split("|")]
    assert cells[-3:] == ["1.25", "failed", ""]
    (t1,) = [line for line in text.splitlines() if line.startswith("| T1 ")]
    assert "460 TFLOP/s" in t1
    assert "met (good)" in t1
    (t6,) = [line for line in text.splitlines() if line.startswith("| T6 ")]
    assert "not measured" in t6
    assert "T6 decode" in next(line for line in text.splitlines() if line.startswith("- targets not measured"))


def test_the_summary_has_verdicts_and_tables() -> None:
    text = report.summary([OK, PEER])
    assert "met (good)" in text
    assert "## Prefill" in text


def test_a_case_without_a_time_of_ours_shows_the_peer_s() -> None:
    rows = [replace(OK, status="wrong", reason="off", median_us=None), PEER]
    line = next(line for line in page(rows, [RUN], 1).splitlines() if line.startswith("| prefill Llama"))
    assert "wrong" in line
    assert "1,500 µs" in line


def test_everything_is_written_and_runs_come_back(tmp_path) -> None:
    save_runs(tmp_path, [RUN, replace(RUN, command="again")])
    assert load_runs(tmp_path) == [RUN, replace(RUN, command="again")]
    decode = replace(OK, case="d", kind="decode", kv_bytes=1e8, of_copy_ratio=0.8)
    write_report(tmp_path, [OK, PEER, decode], [RUN], 3)
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "![prefill](prefill.png)" in (tmp_path / "README.md").read_text()


def test_without_rows_nothing_is_claimed(tmp_path) -> None:
    write_report(tmp_path, [], [RUN], 3)
    text = (tmp_path / "README.md").read_text()
    assert "0 of 3" in text
    assert "met (" not in text
    assert not list(tmp_path.glob("*.png"))


def test_other_files_are_refused(tmp_path) -> None:
    assert load_runs(tmp_path) == []
    (tmp_path / report.RUNS_NAME).write_text('{"a": 1}')
    with pytest.raises(InputError, match="not the runs"):
        load_runs(tmp_path)
