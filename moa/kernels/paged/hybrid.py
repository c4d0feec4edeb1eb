"""Launches prefill tiles and splits of decodes together, and says beforehand whether that pays.

Importing this module imports triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moa.kernels.paged.hybrid_kernel import hybrid_kernel
from moa.kernels.paged.launch import Call, Partials, on_device
from moa.kernels.paged.tiles import Tile


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class HybridWork:
    """What one layer's launch runs.

    Args:
        prefill: entries int32 [entries, 8] of whole tiles.
        decode: splits int32 [capacity, 8], of which `live` int32 [1] count.
        live: as `SplitLists.live`.
        prefill_tile: its warps and stages are `decode_tile`'s too.
        decode_tile: the tile of the splits.
    """

    prefill: torch.Tensor
    decode: torch.Tensor
    live: torch.Tensor
    prefill_tile: Tile
    decode_tile: Tile

    def __post_init__(self) -> None:
        tiles = self.prefill_tile, self.decode_tile
        if len({(tile.warps, tile.stages) for tile in tiles}) > 1:
            raise ValueError(f"tiles of one launch must have the same warps and stages, got {tiles}")


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Tickets:
    """Counters that multiprocessors draw tickets from.

    Args:
        counters: int32 [2 + multiprocessors]; 0 before each launch.
        told: the multiprocessor of each program, int32 [programs], where kernels are interpreted; None on a GPU.
    """

    counters: torch.Tensor
    told: torch.Tensor | None = None


def attend_hybrid(call: Call, work: HybridWork, partials: Partials, tickets: Tickets | None = None) -> None:
    """Run both lists in one launch; results equal those of two launches with the same tiles bit for bit.

    Args:
        call: tensors and scores.
        work: the lists.
        partials: room for results of splits; merging them is another launch.
        tickets: have multiprocessors draw tickets; None to spread decodes evenly over the grid.
    """
    told = tickets is not None and tickets.told is not None
    counters = work.live if tickets is None else tickets.counters
    places = tickets.told if tickets is not None and tickets.told is not None else work.live
    with on_device(call.q):
        hybrid_kernel[len(work.prefill) + len(work.decode),](
            *call.tensors, work.prefill, work.decode, partials.out, partials.lse, work.live, counters, places,
            len(work.prefill), len(counters) - 2, *call.numbers, **call.constants, BM=work.prefill_tile.rows,
            BN=work.prefill_tile.keys, DECODE_BM=work.decode_tile.rows, DECODE_BN=work.decode_tile.keys,
            BY_TICKET=tickets is not None, TOLD_SM=told, num_warps=work.prefill_tile.warps,
            num_stages=work.prefill_tile.stages,
        )  # fmt: skip
