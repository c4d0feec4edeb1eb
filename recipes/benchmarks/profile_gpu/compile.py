"""Compile the profile's Triton kernels for GPUs that need not be there, and table what they take.

    python recipes/benchmarks/profile_gpu/compile.py --write                   all of them, into resources.csv
    python recipes/benchmarks/profile_gpu/compile.py --head-dims 128           some of them, as CSV on stdout

Runs on a CPU; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.kernels.offline import ELEMENT_BYTES, SHARED_KIB, source_digest, tabulate, usage_of
from moa.kernels.paged.tiles import Tile
from moa.profile import triton_kernels as kernels
from moa.profile.triton_tiles import padded_head_dim, tiles_for

TABLE = Path(__file__).with_name("resources.csv")
INPUTS = {"Q", "K", "V", "DO", "DQ", "DK", "DV"}
INT32 = {"HQ", "N", "lo_stride", "n_blocks", "sink", "window"}
INT32_POINTERS = {"LO", "WINDOWS", "STARTS", "RIMS"}
FLOATS = {"scale", "softcap", "shift"}
SPANS = 64  # of a grid for 128k tokens, filled up to a power of two


def kind_of(name: str, dtype: str) -> str:
    """Triton's type of an argument."""
    if name in INPUTS:
        return f"*{dtype}"
    if name in INT32_POINTERS:
        return "*i32"
    if name in FLOATS:
        return "fp32"
    if name in INT32:
        return "i32"
    return "i32%16" if name.startswith("s") else "*fp32"


def rows(capabilities: list[int], dtypes: list[str], head_dims: list[int]) -> Iterator[dict[str, Any]]:
    for capability in capabilities:
        for dtype in dtypes:
            for head_dim in head_dims:
                yield from _kernels(capability, dtype, head_dim)


def _kernels(capability: int, dtype: str, head_dim: int) -> Iterator[dict[str, Any]]:
    tiles = tiles_for(head_dim, ELEMENT_BYTES[dtype], SHARED_KIB[capability])
    joint, moa = {"JOINT": True, "SIGNED": True}, {"JOINT": False, "SIGNED": False}
    chosen: list[tuple[str, Any, Tile, dict[str, Any]]] = [
        ("forward", kernels.forward_kernel, tiles.forward, {}),
        ("sweep", kernels.sweep_kernel, tiles.sweep, joint),
        ("sweep, estimator moa", kernels.sweep_kernel, tiles.sweep, moa),
        ("key_value", kernels.key_value_kernel, tiles.key_value, {}),
    ]
    for name, kernel, tile, more in chosen:
        constants = {
            "G": 4, "D": head_dim, "DP": padded_head_dim(head_dim), "SP": SPANS, "BM": tile.rows, "BN": tile.keys,
            "SOFTCAP": False, "PRECISION": "tf32x3", **more,
        }  # fmt: skip
        kinds = {arg: kind_of(arg, dtype) for arg in kernel.arg_names}
        usage = usage_of(kernel, kinds, constants, capability, tile.warps, tile.stages)
        yield {
            "target": f"sm_{capability}", "dtype": dtype, "head_dim": head_dim, "kernel": name,
            "tile": f"{tile.rows}x{tile.keys}", "warps": tile.warps, "stages": tile.stages, **asdict(usage),
            "source": source_digest(kernel),
        }  # fmt: skip


if __name__ == "__main__":
    tabulate(__doc__, TABLE, {"dtypes": ["bf16", "fp32"], "head_dims": [64, 128, 256]}, rows)
