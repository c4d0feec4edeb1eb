"""The tables of tiles that ship: whole, sound, and chosen by name, capability and shared memory, never in silence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from moa.errors import ResourceError
from moa.kernels.paged import configs
from moa.kernels.paged.configs import Device, TileTable

H200 = Device("NVIDIA H200", (9, 0), 227)
TABLES = configs.tables()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.source)
def test_a_table_covers_every_kernel(table: TileTable) -> None:
    kernels = ("prefill", "decode", "hybrid_prefill", "hybrid_decode")
    wanted = set(itertools.product(kernels, (64, 128, 256), (2, 4), ("model", "int8", "fp8")))
    assert set(table.tiles) == wanted
    for key, tiles in table.tiles.items():
        assert len({tile.rows for tile in tiles}) == len(tiles), f"two tiles of one size for {key}"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.source)
def test_both_halves_of_a_hybrid_launch_run_alike(table: TileTable) -> None:
    for (kernel, *rest), tiles in table.tiles.items():
        if kernel == "hybrid_prefill":
            ((prefill,), (decode,)) = tiles, table.tiles["hybrid_decode", *rest]
            assert (prefill.warps, prefill.stages, prefill.per_sm) == (decode.warps, decode.stages, decode.per_sm)


@pytest.mark.parametrize(
    ("device", "source"),
    [
        (H200, "sm90.json"),
        (Device("NVIDIA A100-SXM4-80GB", (8, 0), 163), "sm80.json"),
        (Device("Orin", (8, 7), 163), "sm80.json"),
        (Device("NVIDIA A10", (8, 6), 99), "sm86.json"),
        (Device("NVIDIA L40S", (8, 9), 99), "sm86.json"),
        (Device("NVIDIA RTX PRO 6000", (12, 0), 99), "default.json"),
        (Device("NVIDIA B200", (10, 0), 227), "default.json"),
        (Device("a Hopper with less", (9, 0), 100), "default.json"),
        (Device("Tesla T4", (7, 5), 64), "default.json"),
        (configs.INTERPRETER, "default.json"),
    ],
)
def test_a_device_gets_the_table_made_for_it(device: Device, source: str) -> None:
    assert configs.table_for(device).source == source


def entries(table: str, **changes: object) -> dict:
    return {**json.loads((configs.FOLDER / table).read_text()), **changes}


def test_a_table_measured_on_the_device_comes_first(tmp_path: Path) -> None:
    (tmp_path / "default.json").write_text(json.dumps(entries("default.json")))
    (tmp_path / "sm90.json").write_text(json.dumps(entries("sm90.json")))
    (tmp_path / "h200.json").write_text(json.dumps(entries("sm90.json", devices=["NVIDIA H200"], shared_kib=100)))
    assert configs.table_for(H200, tmp_path).source == "h200.json"
    assert configs.table_for(H200._replace(name="NVIDIA H100"), tmp_path).source == "sm90.json"


def test_too_little_shared_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ResourceError, match=r"Tesla X has too little shared memory.* 48 KiB per thread block, wanted 64"
    ):
        configs.table_for(Device("Tesla X", (6, 0), 48))


def test_the_smallest_tile_that_holds_the_rows_runs() -> None:
    table = configs.table_for(H200)
    rows = [table.tile("prefill", 128, torch.bfloat16, "model", n).rows for n in (1, 64, 65, 10**6)]
    assert rows == [64, 64, 128, 128]
    assert table.tile("decode", 80, torch.float16, "int8", 1) == table.tile("decode", 128, torch.bfloat16, "int8", 16)
    assert table.tile("decode", 16, torch.bfloat16, "model", 1) == table.tile("decode", 64, torch.bfloat16, "model", 1)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    table = configs.table_for(H200)
    with pytest.raises(ValueError, match=r"q: wanted float32, bfloat16 or float16, got torch\.float64; use"):
        table.tile("prefill", 64, torch.float64, "model", 1)
    with pytest.raises(ValueError, match="q: wanted head_dim up to 256, got 257; use"):
        table.tile("prefill", 257, torch.float32, "model", 1)
    configs.check_kv_kind("fp8", H200)
    configs.check_kv_kind("fp8", configs.INTERPRETER)
    with pytest.raises(ResourceError, match=r"FP8 .* 8.9 or later, NVIDIA A10 has 8.6; use int8"):
        configs.check_kv_kind("fp8", Device("NVIDIA A10", (8, 6), 99))


BROKEN = {
    "not JSON": ("{", "Invalid JSON"),
    "an unknown key": (
        json.dumps(entries("sm90.json", device=["x"])),
        "device: Extra inputs .* did you mean 'devices'",
    ),
    "a missing key": (json.dumps({"devices": []}), "Field required"),
    "odd rows": ({"rows": 48}, "tiles.0.*rows must be a power of two from 16 to 256, got 48"),
    "keys that do not divide a page": ({"keys": 48}, "tiles.0.keys: Input should be 16, 32 or 64"),
    "an unknown kernel": ({"kernel": "prefil"}, "tiles.0.kernel"),
    "warps that are no number": ({"warps": "4"}, "tiles.0.warps"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_is_refused_naming_the_entry(case: str, tmp_path: Path) -> None:
    text, message = BROKEN[case]
    if isinstance(text, dict):
        table = entries("sm90.json")
        table["tiles"][0] |= text
        text = json.dumps(table)
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=f"broken.json: .*{message}"):
        configs.read_table(tmp_path / "broken.json")
