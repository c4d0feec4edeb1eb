"""Launches the planner of splits into lists that stay where they are, so that a CUDA graph can replay it.

Importing this module imports triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moa.kernels.paged import plan_kernel
from moa.kernels.paged.splits import Item, plan_capacity

# One thread block holds all items of a layer in registers, so many at most; rows of the work list go by blocks of BLOCK.
MOST_ITEMS = 16384
BLOCK = 1024


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class SplitLists:
    """What the planner writes, for all layers.

    Args:
        work: splits, longest first, int32 [L, plan_capacity, 8]; columns as in `moa.kernels.paged.splits.Item`.
        items: int32 [L, M * HKV, 8], tile-major.
        live: how many rows of `work` are splits, the rest pads it, int32 [L].
    """

    work: torch.Tensor
    items: torch.Tensor
    live: torch.Tensor

    @classmethod
    def empty(cls, n_layers: int, n_tiles: int, n_heads: int, slots: int, device: torch.device) -> SplitLists:
        """Lists for `n_tiles` tiles with `n_heads` KV heads on a device that runs `slots` thread blocks at once.

        Raises:
            ValueError: more items than the planner holds.
        """
        if n_tiles * n_heads > MOST_ITEMS:
            raise ValueError(
                f"the planner of splits takes up to {MOST_ITEMS} items (tiles x KV heads), got {n_tiles} x {n_heads}; "
                "run fewer sequences in a step"
            )
        columns, capacity = len(Item._fields), plan_capacity(n_tiles * n_heads, slots)
        shapes = (n_layers, capacity, columns), (n_layers, n_tiles * n_heads, columns), (n_layers,)
        return cls(*[torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes])


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class PlannerInput:
    """What the planner reads; see `HeadRules` and `Step` in `moa.kernels.paged.splits` for what each tensor holds."""

    slices: torch.Tensor  # int32 [S, 4]
    pinned: torch.Tensor  # int64 [S]
    tiles: torch.Tensor  # int32 [M, 2]
    rules: torch.Tensor  # int64 [R, 3]
    rule_of_head: torch.Tensor  # int32 [L, HKV]
    sink_tokens: int
    min_span_tokens: int


def plan_splits(given: PlannerInput, group: int, rows: int, lists: SplitLists, block: int = BLOCK) -> None:
    """Fill `lists` for tiles of `rows` rows; no copy to or from the host, the same launch whatever the lengths."""
    n_items, capacity = lists.items.shape[1], lists.work.shape[1]
    n_layers, n_heads = given.rule_of_head.shape
    items_p = triton.next_power_of_2(n_items)
    plan_kernel.plan_kernel[n_layers,](
        given.slices, given.pinned, given.rules, given.rule_of_head, given.tiles, lists.work, lists.items,
        lists.live, n_items // n_heads, n_heads, given.sink_tokens, given.min_span_tokens, capacity,
        G=group, ROWS=rows, ITEMS_P=items_p, BLOCK=block,
        num_warps=warps_for(items_p),
    )  # fmt: skip


def warps_for(n_items: int) -> int:
    """Warps of the planner: up to 4 items a thread, 16 at most, keep registers from spilling much."""
    return 8 if n_items <= 1024 else 16 if n_items <= 4096 else 32
