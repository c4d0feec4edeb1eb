"""The attention kernels compile for GPUs that are not here, fit them, and take what the table says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moa.kernels.paged.configs import Device, TileTable, table_for

FOLDER = Path(__file__).resolve().parents[3] / "recipes" / "benchmarks" / "kernels_gpu"
# KiB of shared memory that a thread block can have, and that a multiprocessor has (CUDA C++ Programming Guide).
SHARED_KIB = {"sm_80": (163, 164), "sm_89": (99, 100), "sm_90": (227, 228)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
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
            for tile in tiles[kernel, *rest]:
                row = table[target, kernel, dtype, head_dim, kv, f"{tile.rows}x{tile.keys}"]
                found = tuple(int(row[name]) for name in ("warps", "stages", "per_sm"))
                assert found == (tile.warps, tile.stages, tile.per_sm)
        (prefill,), (decode,) = (tiles[kernel, *rest] for kernel in ("hybrid_prefill", "hybrid_decode"))
        both = f"{prefill.rows}x{prefill.keys} + {decode.rows}x{decode.keys}"
        assert table[target, "hybrid", dtype, head_dim, kv, both]["warps"] == str(prefill.warps)


def test_every_kernel_is_there_for_every_target(table) -> None:
    wanted = {
        (target, kernel)
        for target in SHARED_KIB
        for kernel in ("plan", "prefill", "decode", "merge", "hybrid", "append")
    }
    assert {(target, kernel) for target, kernel, *_ in table} == wanted


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
