"""Which tiles the Triton kernels of the profile run with: a table, as tuning at run time costs minutes and reproducibility."""

from __future__ import annotations

from dataclasses import dataclass

from moa.errors import ModelError
from moa.kernels.paged import tiles
from moa.kernels.paged.tiles import LARGEST_HEAD_DIM, Tile


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of the three kernels that have a choice."""

    forward: Tile
    sweep: Tile
    key_value: Tile


# (bytes of an element, padded head_dim, least shared memory of a thread block in KiB) -> tiles; of those that fit the one
# with most. Chosen by what they compile to, recipes/benchmarks/profile_gpu/resources.csv; no GPU has timed them yet.
_TABLE: dict[tuple[int, int, int], Tiles] = {
    (2, 64, 96): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
    (2, 128, 200): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    (2, 128, 160): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    (2, 128, 96): Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    (2, 256, 200): Tiles(Tile(128, 32, 8, 2), Tile(128, 16, 8, 1), Tile(32, 32, 8, 1)),
    (2, 256, 96): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
    (4, 64, 96): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (4, 128, 96): Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 8, 1)),
    (4, 256, 96): Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a row is filled up to.

    Raises:
        ModelError: a head is too wide for a tile.
    """
    if head_dim > LARGEST_HEAD_DIM:
        raise ModelError(f"the Triton backend profiles head_dim up to {LARGEST_HEAD_DIM}, this model has {head_dim}")
    return tiles.padded_head_dim(head_dim)


def tiles_for(head_dim: int, element_bytes: int, shared_kib: int) -> Tiles:
    """The tiles for a head of `head_dim` elements on a device with `shared_kib` of shared memory for a thread block.

    Raises:
        ModelError: none fits.
    """
    key = (element_bytes, max(64, padded_head_dim(head_dim)))
    fitting = {kib: found for (*entry, kib), found in _TABLE.items() if tuple(entry) == key and kib <= shared_kib}
    if not fitting:
        raise ModelError(
            f"no tile of the Triton backend fits head_dim {head_dim} with {element_bytes} bytes per element into "
            f"{shared_kib} KiB of shared memory; profile on the CPU (--device cpu)"
        )
    return fitting[max(fitting)]
