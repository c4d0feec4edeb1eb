"""Compile the attention kernels for GPUs that need not be there, with the tiles that ship, and table what they take.

    python recipes/benchmarks/kernels_gpu/compile.py --write                   all of them, into resources.csv
    python recipes/benchmarks/kernels_gpu/compile.py --head-dims 128           some of them, as CSV on stdout

Runs on a CPU; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moa.kernels.offline import SHARED_KIB, source_digest, tabulate, usage_of
from moa.kernels.paged.append_kernel import append_kernel
from moa.kernels.paged.attend_kernel import attend_kernel
from moa.kernels.paged.configs import Device, TileTable, table_for
from moa.kernels.paged.hybrid_kernel import hybrid_kernel
from moa.kernels.paged.launch import APPEND_TOKENS
from moa.kernels.paged.merge_kernel import merge_kernel
from moa.kernels.paged.plan_kernel import plan_kernel
from moa.kernels.paged.planner import BLOCK, warps_for
from moa.kernels.paged.quantise import most_code
from moa.kernels.paged.tiles import Tile, padded_head_dim

TABLE = Path(__file__).with_name("resources.csv")
KERNELS = ["plan", "prefill", "decode", "merge", "hybrid", "append"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CODES = {"int8": "*i8", "fp8": "*fp8e4nv"}
CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
IN_DTYPE = {"Q", "K", "V", "OUT", "POOL_K", "POOL_V"}
INT32 = {
    "TABLE",
    "SLICES",
    "RULE_OF_HEAD",
    "WORK",
    "ITEMS",
    "TILES",
    "LIVE",
    "PREFILL",
    "DECODE",
    "TICKETS",
    "SM_OF",
    "BLOCKS",
}
INT64 = {"PINNED", "RULES"}
GROUP = 4
# Items of a step, filled up to a power of two, that the planner is compiled for here; the last is its most.
ITEMS = (64, 1024, 16384)
# Triton's own, for kernels without a choice.
PLAIN_WARPS, PLAIN_STAGES = 4, 3


class Job(NamedTuple):
    """A kernel to compile: its name in the table, its tile in words, how it runs, and its constants."""

    name: str
    kernel: Any
    shape: str
    tile: Tile
    constants: dict[str, Any]


def kind_of(name: str, dtype: str, kv: str) -> str:
    """Triton's type of an argument; strides of a token or head are multiples of 16, as head_dim is."""
    if name in IN_DTYPE:
        return f"*{dtype}"
    if name.startswith("CODES"):
        return CODES.get(kv, f"*{dtype}")
    if name in INT32 or name in INT64:
        return "*i32" if name in INT32 else "*i64"
    if name in ("factor", "cap"):
        return "fp32"
    if name.isupper():
        return "*fp32"
    return "i32%16" if name in ("sqt", "sqh", "skt", "skh", "svt", "svh", "sot", "soh") else "i32"


def rows(
    capabilities: list[int], kernels: list[str], dtypes: list[str], kinds: list[str], head_dims: list[int]
) -> Iterator[dict[str, Any]]:
    for capability in capabilities:
        table = table_for(Device("", divmod(capability, 10), SHARED_KIB[capability]))
        yield from (_row(capability, job, "", "", "") for job in planners() if job.name in kernels)
        for dtype, kv, head_dim in product(dtypes, kinds, head_dims):
            # FP8 wants sm_89; in float32, plain KV stands for all.
            if (kv == "fp8" and capability < 89) or (kv != "model" and dtype == "fp32"):
                continue
            for job in jobs(table, dtype, kv, head_dim):
                if job.name in kernels:
                    yield _row(capability, job, dtype, head_dim, kv)


def jobs(table: TileTable, dtype: str, kv: str, head_dim: int) -> Iterator[Job]:
    """All kernels that a model with such heads runs."""
    tiles = {of: table.tiles[of, head_dim, DTYPES[dtype].itemsize, kv] for of in ("prefill", "decode")}
    head = {"D": head_dim, "DP": padded_head_dim(head_dim), "QUANT": kv != "model"}
    scores = {**head, "G": GROUP, "SOFTCAP": False, "HAS_SINKS": False, "UPCAST": False, "PRECISION": "tf32x3"}
    for name, tile in ((name, tile) for name, found in tiles.items() for tile in found):
        constants = {**scores, "BM": tile.rows, "BN": tile.keys, "SHORT": name == "decode"}
        yield Job(name, attend_kernel, f"{tile.rows}x{tile.keys}", tile, constants)
    for tile in tiles["decode"] if kv == "model" else ():
        plain = Tile(tile.rows, 0, PLAIN_WARPS, PLAIN_STAGES)
        yield Job("merge", merge_kernel, f"{tile.rows}", plain, {**scores, "BM": tile.rows})
    yield _hybrid(table, dtype, kv, head_dim, scores)
    codes = {"BT": APPEND_TOKENS, "FLOAT": kv == "fp8", "MOST": most_code(CODE_DTYPES.get(kv, torch.int8))}
    yield Job(
        "append", append_kernel, f"{APPEND_TOKENS}", Tile(APPEND_TOKENS, 0, PLAIN_WARPS, PLAIN_STAGES), head | codes
    )


def _hybrid(table: TileTable, dtype: str, kv: str, head_dim: int, scores: dict[str, Any]) -> Job:
    """With tickets: a few registers more than without."""
    prefill = table.tile("hybrid_prefill", head_dim, DTYPES[dtype], kv, 1)
    decode = table.tile("hybrid_decode", head_dim, DTYPES[dtype], kv, 1)
    constants = {
        **scores, "BM": prefill.rows, "BN": prefill.keys, "DECODE_BM": decode.rows, "DECODE_BN": decode.keys,
        "BY_TICKET": True, "TOLD_SM": False,
    }  # fmt: skip
    shape = f"{prefill.rows}x{prefill.keys} + {decode.rows}x{decode.keys}"
    return Job("hybrid", hybrid_kernel, shape, prefill, constants)


def planners() -> Iterator[Job]:
    for items in ITEMS:
        constants = {"G": GROUP, "ROWS": 16, "ITEMS_P": items, "BLOCK": BLOCK}
        yield Job("plan", plan_kernel, f"{items} items", Tile(16, 0, warps_for(items), PLAIN_STAGES), constants)


def _row(capability: int, job: Job, dtype: str, head_dim: int | str, kv: str) -> dict[str, Any]:
    tile, names = job.tile, job.kernel.arg_names
    kinds = {name: kind_of(name, dtype, kv) for name in names}
    constants = {name: value for name, value in job.constants.items() if name in names}
    usage = usage_of(job.kernel, kinds, constants, capability, tile.warps, tile.stages)
    return {
        "target": f"sm_{capability}", "kernel": job.name, "dtype": dtype, "head_dim": head_dim, "kv": kv,
        "tile": job.shape, "warps": tile.warps, "stages": tile.stages, "per_sm": tile.per_sm, **asdict(usage),
        "source": source_digest(job.kernel),
    }  # fmt: skip


if __name__ == "__main__":
    options = {
        "kernels": KERNELS, "dtypes": list(DTYPES), "kinds": ["model", *CODES], "head_dims": [64, 128, 256],
    }  # fmt: skip
    tabulate(__doc__, TABLE, options, rows)
