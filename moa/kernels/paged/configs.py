"""Which tile each kernel runs with: tables that ship, one JSON file per kind of GPU, as tuning at run time costs minutes and
reproducibility.

The table of a device is the one that lists its name; else the one for its compute capability, or an earlier one of the same
major version, that fits its shared memory; else `default.json`. Every table covers every kernel, so what a device gets
comes from one file, `TileTable.source`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moa.errors import ResourceError, closest
from moa.kernels.paged.tiles import LARGEST_HEAD_DIM, Tile, padded_head_dim

Kernel = Literal["prefill", "decode", "hybrid_prefill", "hybrid_decode"]
KVKind = Literal["model", "int8", "fp8"]
FOLDER = Path(__file__).with_name("tables")
ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}  # of the dtypes that kernels take
_LEAST_HEAD_DIM = 64  # of a table's entries; narrower heads run with its tiles


class Device(NamedTuple):
    """What a choice depends on: the driver's name, compute capability, and shared memory of a thread block in KiB."""

    name: str
    capability: tuple[int, int]
    shared_kib: int


# Stands for the GPU where kernels are interpreted.
INTERPRETER = Device("Triton's interpreter", (0, 0), 96)

_AtLeastOne = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    """A line of a table: the tile for slices of up to `rows` rows, where more than one fits for the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kernel: Kernel
    head_dim: Literal[64, 128, 256]
    element_bytes: Literal[2, 4]
    kv: list[KVKind]
    rows: _AtLeastOne
    keys: Literal[16, 32, 64]
    warps: Literal[1, 2, 4, 8, 16]
    stages: Annotated[int, Field(ge=1, le=8)]
    per_sm: Annotated[int, Field(ge=1, le=8)]

    @property
    def keys_of_table(self) -> list[tuple[str, int, int, str]]:
        return [(self.kernel, self.head_dim, self.element_bytes, kv) for kv in self.kv]

    @property
    def tile(self) -> Tile:
        return Tile(self.rows, self.keys, self.warps, self.stages, self.per_sm)

    @model_validator(mode="after")
    def _rows_fit_a_tensor_core(self) -> Self:
        if self.rows not in (16, 32, 64, 128, 256):
            raise ValueError(f"rows must be a power of two from 16 to 256, got {self.rows}")
        return self


class _File(BaseModel):
    """A table as it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    devices: list[str]
    capability: Annotated[list[int], Field(min_length=2, max_length=2)] | None
    shared_kib: _AtLeastOne
    chosen_by: str
    tiles: list[_Entry]


@dataclass(frozen=True, slots=True)
class TileTable:
    """The tiles of one kind of GPU.

    Args:
        source: the file's name.
        devices: names of the devices that it was measured on.
        capability: compute capability, None for any.
        shared_kib: what all its tiles fit.
        chosen_by: how its tiles were found.
        tiles: per (kernel, head_dim, bytes of an element, kind of KV), by rows.
    """

    source: str
    devices: tuple[str, ...]
    capability: tuple[int, int] | None
    shared_kib: int
    chosen_by: str
    tiles: dict[tuple[str, int, int, str], tuple[Tile, ...]]

    def tile(self, kernel: Kernel, head_dim: int, dtype: torch.dtype, kv: KVKind, rows: int) -> Tile:
        """The smallest tile with at least `rows` rows, the largest there is if none has.

        Args:
            kernel: what runs.
            head_dim: at most 256.
            dtype: of queries, keys and values.
            kv: how the window is stored.
            rows: tokens times query heads of a KV head, of the longest slice.

        Raises:
            ValueError: head_dim or dtype is none that the kernels take.
        """
        check_heads(head_dim, dtype)
        wide = max(_LEAST_HEAD_DIM, padded_head_dim(head_dim))
        tiles = self.tiles[kernel, wide, ELEMENT_BYTES[dtype], kv]
        return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


def read_table(path: Path) -> TileTable:
    """The table in a file.

    Raises:
        ValueError: it is none: names the file, the entry and what is wrong with it.
    """
    try:
        file = _File.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = [*_File.model_fields, *_Entry.model_fields]
        hint = closest(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{path.name}: {where}: {first['msg']}{hint}") from error
    tiles: dict[tuple[str, int, int, str], tuple[Tile, ...]] = {}
    for entry in sorted(file.tiles, key=lambda entry: entry.rows):
        for key in entry.keys_of_table:
            tiles[key] = (*tiles.get(key, ()), entry.tile)
    capability = None if file.capability is None else (file.capability[0], file.capability[1])
    return TileTable(path.name, tuple(file.devices), capability, file.shared_kib, file.chosen_by, tiles)


@functools.cache
def tables(folder: Path = FOLDER) -> tuple[TileTable, ...]:
    """All tables of a folder."""
    return tuple(read_table(path) for path in sorted(folder.glob("*.json")))


@functools.cache
def table_for(device: Device, folder: Path = FOLDER) -> TileTable:
    """The table of a device.

    Raises:
        ResourceError: a thread block of the device has too little shared memory for any.
    """
    suited = [table for table in tables(folder) if _suits(table, device)]
    fitting = [table for table in suited if table.shared_kib <= device.shared_kib]
    if not fitting:
        least = min(table.shared_kib for table in suited)
        raise ResourceError(
            f"{device.name} has too little shared memory for the Triton kernels: {device.shared_kib} KiB per thread block, "
            f"wanted {least}; use backend='torch'"
        )
    return max(
        fitting, key=lambda table: (device.name in table.devices, table.capability is not None, table.shared_kib)
    )


def _suits(table: TileTable, device: Device) -> bool:
    if device.name in table.devices or table.capability is None:
        return True
    return table.capability[0] == device.capability[0] and table.capability <= device.capability


def device_of(device: torch.device) -> Device:
    """What the choice of tiles needs to know of a CUDA device; the interpreter's stand-in for any other."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared_kib = int(properties.shared_memory_per_block_optin) // 1024  # type: ignore[attr-defined]  # not in the stub
    return Device(properties.name, (properties.major, properties.minor), shared_kib)


def check_heads(head_dim: int, dtype: torch.dtype) -> None:
    """Refuse queries that no kernel takes; raises ValueError."""
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"q: wanted float32, bfloat16 or float16, got {dtype}; use backend 'torch' for others")
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(f"q: wanted head_dim up to {LARGEST_HEAD_DIM}, got {head_dim}; use backend 'torch'")


def takes_kv_kind(kv: KVKind, device: Device) -> bool:
    """Whether the device has the format: E4M3 came with compute capability 8.9; the interpreter has all."""
    return kv != "fp8" or device.capability >= (8, 9) or device == INTERPRETER


def check_kv_kind(kv: KVKind, device: Device) -> None:
    """Refuse a format that the device lacks.

    Raises:
        ResourceError: FP8 on a GPU without it.
    """
    if not takes_kv_kind(kv, device):
        major, minor = device.capability
        raise ResourceError(
            f"kv: FP8 (E4M3) wants compute capability 8.9 or later, {device.name} has {major}.{minor}; use int8"
        )
