"""Compile the profile's Triton kernels for GPUs that need not be there, and table what they take.

    python recipes/benchmarks/profile_gpu/compile.py --write                   all of them, into resources.csv
    python recipes/benchmarks/profile_gpu/compile.py --head-dims 128           some of them, as CSV on stdout

Triton brings ptxas and cuobjdump, so this runs on a CPU; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moa.profile import triton_kernels as kernels
from moa.profile.triton_tiles import Tile, padded_head_dim, tiles_for

TABLE = Path(__file__).with_name("resources.csv")
# KiB of shared memory that one thread block can have.
SHARED_KIB = {80: 163, 89: 99, 90: 227}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD_DIMS = (64, 128, 256)
INPUTS = {"Q", "K", "V", "DO", "DQ", "DK", "DV"}
INT32 = {"LO", "WINDOWS", "STARTS", "RIMS", "HQ", "N", "lo_stride", "n_blocks", "sink", "window"}
INT32_POINTERS = {"LO", "WINDOWS", "STARTS", "RIMS"}
FLOATS = {"scale", "softcap", "shift"}
SPANS = 64  # of a grid for 128k tokens, filled up to a power of two


def signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Triton's type of each argument."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in INPUTS:
            kinds[name] = f"*{dtype}"
        elif name in FLOATS:
            kinds[name] = "fp32"
        elif name in INT32_POINTERS:
            kinds[name] = "*i32"
        elif name in INT32 or name.startswith("s"):
            kinds[name] = "i32"
        else:
            kinds[name] = "*fp32"
    return kinds


def compiled(kernel: Any, dtype: str, capability: int, tile: Tile, constants: dict[str, Any]) -> Any:
    """The kernel for one kind of GPU."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = signature(kernel, dtype, constants)
    names = list(kinds)
    aligned = [n for n, kind in kinds.items() if kind.startswith("*") or (n.startswith("s") and len(n) == 3)]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> tuple[int, int]:
    """Registers of a thread and bytes it spills."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(word.split(":") for line in text.splitlines() if "REG:" in line for word in line.split()[:2])
    return int(words["REG"]), int(words["STACK"])


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
        binary = compiled(kernel, dtype, capability, tile, constants)
        registers, spills = resources(binary)
        yield {
            "target": f"sm_{capability}", "dtype": dtype, "head_dim": head_dim, "kernel": name,
            "tile": f"{tile.rows}x{tile.keys}", "warps": tile.warps, "stages": tile.stages,
            "registers": registers, "spill_bytes": spills, "shared_bytes": binary.metadata.shared,
            "triton": triton.__version__,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead of stdout")
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(SHARED_KIB))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    args = parser.parse_args()
    table = list(rows(args.capabilities, args.dtypes, args.head_dims))
    with TABLE.open("w", newline="") if args.write else sys.stdout as out:
        writer = csv.DictWriter(out, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
