"""Which tokens of a packed step belong to which sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moa.spans import MAX_TOKENS


class Slice(NamedTuple):
    """The tokens of one sequence in a packed step.

    `sequence` is its id in the KV memory, `offset` its first token in the packed tensors, `tokens` how many it has, and
    `position` the absolute position of the first.
    """

    sequence: int
    offset: int
    tokens: int
    position: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: a slice per sequence, prefill chunks and decodes in any mix; tokens in no slice are padding.

    Checked once, here, so that every layer of a step may rely on it. `sequences` and `positions` are those of the
    slices, `end` is the first packed token behind all of them, `are_single` says whether each has one token.

    Raises:
        ValueError: a slice without tokens or before the step's first token, two slices of one sequence or of one token.
    """

    slices: tuple[Slice, ...]
    sequences: tuple[int, ...] = field(init=False, repr=False, compare=False)
    positions: tuple[int, ...] = field(init=False, repr=False, compare=False)
    end: int = field(init=False, repr=False, compare=False)
    are_single: bool = field(init=False, repr=False, compare=False)
    _pieces: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _places: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        slices = tuple(self.slices)
        sequences, _, tokens, positions = zip(*slices, strict=True) if slices else ((), (), (), ())
        pieces, places = _laid_out(slices)
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "sequences", sequences)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "end", sum(pieces))
        object.__setattr__(self, "are_single", sum(tokens) == len(slices))
        object.__setattr__(self, "_pieces", pieces)
        object.__setattr__(self, "_places", places)

    @classmethod
    def pack(cls, parts: Iterable[tuple[int, int, int]]) -> Batch:
        """Lay (sequence, tokens, position) one after the other."""
        slices, offset = [], 0
        for sequence, tokens, position in parts:
            slices.append(Slice(sequence, offset, tokens, position))
            offset += tokens
        return cls(tuple(slices))

    def cut(self, packed: torch.Tensor, dim: int = 0) -> list[torch.Tensor]:
        """Views of each slice's part of a tensor that has the step's tokens, and padding, along `dim`."""
        pieces = packed.split_with_sizes([*self._pieces, packed.shape[dim] - self.end], dim)
        return [pieces[place] for place in self._places]

    def join(self, parts: Sequence[torch.Tensor], like: torch.Tensor, padding: float) -> torch.Tensor:
        """Each slice's part in its place in a tensor like `like` [T, ...], `padding` elsewhere."""
        if len(parts) == 1 and parts[0].shape[0] == like.shape[0]:
            return parts[0]
        at = dict(zip(self._places, parts, strict=True))
        sizes = (*self._pieces, like.shape[0] - self.end)
        gaps = {i: n for i, n in enumerate(sizes) if n and i not in at}
        at |= {i: like.new_full((n, *like.shape[1:]), padding) for i, n in gaps.items()}
        return torch.cat([at[i] for i in sorted(at)])


def _laid_out(slices: tuple[Slice, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of slices, and of the gaps before them, in packed order; and each slice's place there.

    Raises:
        ValueError: they cannot be one step.
    """
    pieces, places, owners, end = list[int](), [0] * len(slices), set[int](), 0
    for i, item in sorted(enumerate(slices), key=lambda pair: pair[1][1]):
        sequence, offset, tokens, position = item
        if not (type(sequence) is type(offset) is type(tokens) is type(position) is int):
            raise ValueError(f"batch: wanted ints in {item}; take .item() of tensors and arrays first")
        if tokens < 1:
            raise ValueError(f"batch: wanted at least 1 token in {item}; leave out sequences with nothing to do")
        if offset < 0 or position < 0 or position + tokens > MAX_TOKENS:
            raise ValueError(f"batch: wanted offset >= 0 and 0 <= position < 2**40 in {item}; both count from 0")
        if offset < end:
            raise ValueError(
                f"batch: {item} begins inside another slice, which ends at {end}; give each its own tokens"
            )
        if sequence in owners:
            raise ValueError(f"batch: sequence {sequence} has two slices; give each sequence one slice per step")
        owners.add(sequence)
        if offset > end:
            pieces.append(offset - end)
        places[i] = len(pieces)
        pieces.append(tokens)
        end = offset + tokens
    return tuple(pieces), tuple(places)
