"""Which tile a kernel runs with."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and keys of a tile, and how it is run; `keys` divides 64, `per_sm` thread blocks share a multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    per_sm: int = 1


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a row is filled up to; 16 is the least a tensor core multiplies.

    Raises:
        ValueError: a head is too wide for a tile.
    """
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(f"head_dim of the Triton backend is at most {LARGEST_HEAD_DIM}, got {head_dim}")
    return max(16, 1 << (head_dim - 1).bit_length())
