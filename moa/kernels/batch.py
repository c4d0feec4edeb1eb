"""Which tokens of a packed step belong to which sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


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
    """One step: a slice per sequence, prefill chunks and decodes in any mix; tokens in no slice are padding."""

    slices: tuple[Slice, ...]

    @classmethod
    def pack(cls, parts: Iterable[tuple[int, int, int]]) -> Batch:
        """Lay (sequence, tokens, position) one after the other."""
        slices, offset = [], 0
        for sequence, tokens, position in parts:
            slices.append(Slice(sequence, offset, tokens, position))
            offset += tokens
        return cls(tuple(slices))
