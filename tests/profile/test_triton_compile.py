"""The Triton kernels compile for GPUs that are not here, fit their shared memory, and take what the table says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moa.profile import triton_kernels
from moa.profile.triton_tiles import tiles_for

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "benchmarks" / "profile_gpu"
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
# KiB of shared memory that one thread block can have (CUDA C++ Programming Guide, compute capabilities).
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227}
Row = dict[str, str]


@pytest.fixture(scope="module")
def table(recorded):
    return recorded(FOLDER / "resources.csv", ("target", "dtype", "head_dim", "kernel"))


@pytest.mark.slow
def test_kernels_take_what_the_table_says(compiled: Callable[..., list[Row]], table) -> None:
    rows = compiled(FOLDER / "compile.py", "--dtypes", "bf16", "--head-dims", "128")
    assert {row["target"] for row in rows} == set(SHARED_KIB)
    assert len(rows) == 4 * len(SHARED_KIB)
    table.check(rows)


@pytest.mark.nightly
def test_all_kernels_take_what_the_table_says(compiled: Callable[..., list[Row]], table) -> None:
    rows = compiled(FOLDER / "compile.py")
    assert {table.key(row) for row in rows} == set(table)
    table.check(rows)


def test_the_table_has_the_tiles_that_run(table) -> None:
    assert len(table) == len(SHARED_KIB) * len(ELEMENT_BYTES) * 3 * 4
    for row in table.values():
        tiles = tiles_for(int(row["head_dim"]), ELEMENT_BYTES[row["dtype"]], SHARED_KIB[row["target"]])
        tile = getattr(tiles, row["kernel"].partition(",")[0])
        assert row["tile"] == f"{tile.rows}x{tile.keys}"
        assert (int(row["warps"]), int(row["stages"])) == (tile.warps, tile.stages)
        assert int(row["shared_bytes"]) <= SHARED_KIB[row["target"]] * 1024


def test_the_usual_heads_hardly_spill(table) -> None:
    """bfloat16 with head_dim 64 and 128: what nearly all models have."""
    usual = [row for row in table.values() if row["dtype"] == "bf16" and int(row["head_dim"]) <= 128]
    assert len(usual) == 24
    assert max(int(row["spill_bytes"]) for row in usual) <= 64


def test_every_kernel_is_as_it_was_compiled(table) -> None:
    names = {row["kernel"] for row in table.values()}
    kernels = {name: getattr(triton_kernels, f"{name.partition(',')[0]}_kernel") for name in names}
    assert table.stale(kernels) == set(), "after a change of kernels: compile.py --write"
