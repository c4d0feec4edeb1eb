"""The attention kernels compile for GPUs that are not here, fit them, and take what the table says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import triton.language as tl

from moa.kernels.paged import tile
from moa.kernels.paged.append_kernel import append_kernel
from moa.kernels.paged.attend_kernel import attend_kernel
from moa.kernels.paged.configs import Device, TileTable, table_for
from moa.kernels.paged.hybrid_kernel import hybrid_kernel
from moa.kernels.paged.merge_kernel import merge_kernel
from moa.kernels.paged.plan_kernel import plan_kernel

FOLDER = Path(__file__).resolve().parents[3] / "recipes" / "benchmarks" / "kernels_gpu"
# KiB of shared memory that a thread block can have, and that a multiprocessor has (CUDA C++ Programming Guide).
SHARED_KIB = {"sm_80": (163, 164), "sm_89": (99, 100), "sm_90": (227, 228)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = {
    "plan": plan_kernel,
    "prefill": attend_kernel,
    "decode": attend_kernel,
    "merge": merge_kernel,
    "hybrid": hybrid_kernel,
    "append": append_kernel,
}
Row = dict[str, str]


@pytest.fixture(scope="module")
def table(recorded):
    return recorded(FOLDER / "resources.csv", ("target", "kernel", "dtype", "head_dim", "kv", "tile"))


def tiles_of(target: str) -> TileTable:
    capability = divmod(int(target.removeprefix("sm_")), 10)
    return table_for(Device("", capability, SHARED_KIB[target][0]))


@pytest.mark.slow
def test_kernels_take_what_the_table_says(compiled: Callable[..., list[Row]], table) -> None:
    kernels = "--kernels", "decode", "append", "--kinds", "model", "--dtypes", "bf16", "--head-dims", "128"
    rows = compiled(FOLDER / "compile.py", *kernels)
    assert {row["target"] for row in rows} == set(SHARED_KIB)
    assert len(rows) == 3 * len(SHARED_KIB)
    table.check(rows)


@pytest.mark.nightly
def test_all_kernels_take_what_the_table_says(compiled: Callable[..., list[Row]], table) -> None:
    rows = compiled(FOLDER / "compile.py")
    assert {table.key(row) for row in rows} == set(table)
    table.check(rows)


@pytest.mark.parametrize("target", SHARED_KIB)
def test_the_table_has_the_tiles_that_ship(target: str, table) -> None:
    tiles = tiles_of(target).tiles
    for dtype, head_dim, kv in {(row["dtype"], row["head_dim"], row["kv"]) for row in table.values() if row["dtype"]}:
        if kv == "fp8" and target == "sm_80":
            continue
        rest = int(head_dim), DTYPES[dtype].itemsize, kv
        for kernel in ("prefill", "decode"):
            for one in tiles[kernel, *rest]:
                row = table[target, kernel, dtype, head_dim, kv, f"{one.rows}x{one.keys}"]
                found = tuple(int(row[name]) for name in ("warps", "stages", "per_sm"))
                assert found == (one.warps, one.stages, one.per_sm)
        (prefill,), (decode,) = (tiles[kernel, *rest] for kernel in ("hybrid_prefill", "hybrid_decode"))
        both = f"{prefill.rows}x{prefill.keys} + {decode.rows}x{decode.keys}"
        assert table[target, "hybrid", dtype, head_dim, kv, both]["warps"] == str(prefill.warps)


def test_every_kernel_is_there_for_every_target_as_it_is_now(table) -> None:
    assert {(target, kernel) for target, kernel, *_ in table} == set(product(SHARED_KIB, KERNELS))
    assert table.stale(KERNELS) == set(), "after a change of kernels: compile.py --write"


def test_a_change_of_what_a_kernel_calls_makes_its_rows_stale(table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "LN2", tl.constexpr(0.5))
    assert {kernel for _, kernel, *_ in table.stale(KERNELS)} == {"prefill", "decode", "merge", "hybrid"}


def test_thread_blocks_fit_their_multiprocessor(table) -> None:
    """Registers (64k per multiprocessor, 8 at a time) and shared memory (1 KiB of it the system's) for `per_sm` of them."""
    for row in table.values():
        block_kib, sm_kib = SHARED_KIB[row["target"]]
        shared, per_sm = int(row["shared_bytes"]), int(row["per_sm"])
        assert shared <= block_kib * 1024
        assert per_sm * (shared + 1024) <= sm_kib * 1024, row
        assert per_sm * -(-int(row["registers"]) // 8) * 8 * 32 * int(row["warps"]) <= 65536, row


def test_the_usual_heads_do_not_spill(table) -> None:
    """bfloat16 with head_dim 128, pages quantised or not: whatever runs in a step."""
    usual = [row for row in table.values() if (row["dtype"], row["head_dim"]) == ("bf16", "128")]
    assert len(usual) >= 3 * 7
    assert [row for row in usual if row["spill_bytes"] != "0"] == []
