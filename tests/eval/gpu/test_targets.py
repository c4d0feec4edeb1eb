"""Every target finds its figure among rows, and the worst one decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moa.eval.gpu.rows import Row
from moa.eval.gpu.targets import (
    FLASHINFER_EQUAL,
    FLEX,
    OURS,
    PLANNER,
    SDPA_FLASH,
    SERIAL,
    TARGETS,
    WHOLE_STEP,
    Verdict,
    ideal_gain,
    judge,
)

BASE = Row(
    "c", "decode", "Llama-3-8B", "dense", False, 32768, 32, 0, 0, "bf16", OURS, "same", "ok",
    median_us=100.0, tflops=500.0, of_copy_ratio=0.9, kv_bytes=1e9, dense_kv_bytes=1e9,
)  # fmt: skip


def row(**changes) -> Row:
    made = replace(BASE, **changes)
    return replace(
        made, case=f"{made.kind} {made.plan} {made.tokens} {made.batch} {made.chunk} {made.prompts} {made.kv}"
    )


def verdict(number: str, *rows: Row) -> Verdict:
    (found,) = [v for v in judge(rows) if v.target.name.startswith(f"{number} ")]
    return found


PREFILL = {"kind": "prefill", "batch": 1, "tokens": 8192}
RULES = {"plan": "MoA rules", "published": True}
HYBRID = {"kind": "hybrid", "chunk": 512, "prompts": 1, "batch": 8} | RULES
SIDES = (
    row(kind="chunk", chunk=512, batch=1, median_us=70.0, **RULES),
    row(kind="decode", batch=8, median_us=50.0, **RULES),
)
FOUND = {
    "T1": ([row(**PREFILL)], 500),
    "T2a": ([row(**PREFILL), row(**PREFILL, subject=SDPA_FLASH, median_us=120.0)], 1.2),
    "T2b": ([row(**PREFILL), row(**PREFILL, subject=FLEX, median_us=130.0)], 1.3),
    "T3a": ([row(**PREFILL), row(**PREFILL, **RULES, tflops=450.0)], 0.9),
    "T3b": ([row(**PREFILL | {"tokens": 16384}), row(**PREFILL | {"tokens": 16384}, **RULES, tflops=400.0)], 0.8),
    "T3c": ([row(**PREFILL | {"tokens": 65536}), row(**PREFILL | {"tokens": 65536}, **RULES, tflops=485.0)], 0.97),
    "T4": ([row(**PREFILL | {"tokens": 16384}), row(**PREFILL | {"tokens": 16384}, plan="window 1,024", tflops=400.0)], 0.8),
    "T5": ([row(kind="prefill", batch=1), row(kind="chunk", batch=1, chunk=512, tflops=450.0)], 0.9),
    "T6": ([row()], 0.9),
    "T7": ([row(kv_bytes=64e6, of_copy_ratio=0.6)], 0.6),
    "T8": ([row(kv_bytes=5e5, median_us=8.0)], 8.0),
    "T9": ([row(), row(**RULES, kv_bytes=0.5e9, median_us=50.0 / 0.96)], 0.96),
    "T10": ([row(subject=PLANNER, median_us=9.0)], 9.0),
    "T11": ([*SIDES, row(**HYBRID), row(**HYBRID, subject=SERIAL, median_us=125.0)], 1.25),
    "T12": ([row(**HYBRID), row(**HYBRID, subject=SERIAL, median_us=98.0)], 0.98),
    "T13": ([row(), row(kv="fp8", kv_bytes=0.5e9, median_us=60.0)], 100 / 60),
    "T14": ([row(subject=WHOLE_STEP, stored_kv_bytes=1e9 * (1 + 64 / 32768))], 1.0),
    "T15": ([row(**RULES), row(**RULES, subject=FLEX, median_us=110.0)], 1.1),
    "T16": ([row(**RULES), row(**RULES, subject=FLASHINFER_EQUAL, median_us=90.0)], 0.9),
}  # fmt: skip


@pytest.mark.parametrize("number", FOUND)
def test_a_target_finds_its_figure(number) -> None:
    rows, value = FOUND[number]
    found = verdict(number, *rows)
    assert found.worst is not None
    assert found.worst.value == pytest.approx(value)
    reached = [level for level in ("minimum", "good", "stretch") if _holds(found.target, value, level)]
    assert found.verdict == (f"met ({reached[-1]})" if reached else "missed")


def _holds(target, value: float, level: str) -> bool:
    wanted = getattr(target, level)
    return value >= wanted - 1e-9 if target.more_is_better else value <= wanted + 1e-9


def test_every_target_is_tried_here() -> None:
    assert [target.name.split()[0] for target in TARGETS] == list(FOUND)


@pytest.mark.parametrize("number", FOUND)
@pytest.mark.parametrize("status", ["wrong", "failed", "missing", "unsupported"])
def test_rows_that_are_not_ok_measure_nothing(number, status) -> None:
    rows, _ = FOUND[number]
    assert verdict(number, *(replace(row, status=status) for row in rows)).verdict == "not measured"
    assert verdict(number).verdict == "not measured"


def test_the_worst_case_decides() -> None:
    good, bad = row(**PREFILL, tflops=600.0), row(**PREFILL | {"tokens": 65536}, tflops=410.0)
    found = verdict("T1", good, bad)
    assert (found.verdict, found.worst.case, found.cases) == ("met (minimum)", bad.case, 2)
    slow, quick = row(kv_bytes=5e5, median_us=14.0), row(kv_bytes=4e5, median_us=6.0, batch=1)
    assert verdict("T8", slow, quick).verdict == "met (minimum)"


def test_a_twin_is_of_the_same_case() -> None:
    ours = row(**PREFILL)
    for other in ({"tokens": 16384}, {"heads": "Qwen2.5-7B"}, {"batch": 2}, {"plan": "MoA rules"}):
        assert verdict("T2a", ours, row(**PREFILL | other, subject=SDPA_FLASH)).verdict == "not measured"


def test_a_small_ideal_gain_does_not_count_for_the_large_one() -> None:
    sides = (SIDES[0], replace(SIDES[1], median_us=7.0))
    rows = (*sides, row(**HYBRID), row(**HYBRID, subject=SERIAL, median_us=99.0))
    assert ideal_gain(rows, rows[2]) == pytest.approx(1.1)
    assert verdict("T11", *rows).verdict == "not measured"
    assert verdict("T12", *rows).verdict == "met (minimum)"
    assert ideal_gain(rows[1:], rows[2]) is None
