"""What a chunk of queries attends to in one rule group: keys and values in order of position, and who sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moa.kernels.scores import Scores
from moa.spans import Int64Array

# Keys and values.
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Band:
    """Keys and values of one rule group in order of position, and who sees them.

    Args:
        keys: of one rule group [Hg, N, D]; columns `[0, sink)` are the sinks.
        values: [Hg, N, D].
        shift: a window position j lies in column `j - shift`.
        position: absolute position of the first query.
        starts: `lo(p)` of each query, int64 [T].
        sink_tokens: first tokens that every query sees, 0 once none does.
        native_window: the layer's own sliding window in tokens.
        scores: how keys are scored, with sinks [Hg, G], if any.
    """

    keys: torch.Tensor
    values: torch.Tensor
    shift: int
    position: int
    starts: Int64Array
    sink_tokens: int
    native_window: int | None
    scores: Scores

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient for keys or values is asked for."""
        return torch.is_grad_enabled() and (self.keys.requires_grad or self.values.requires_grad)

    def columns(self, first: int, stop: int) -> Pair:
        """Keys and values at positions `[first, stop)`, all of one kind: views [Hg, n, D]."""
        shift = 0 if first < self.sink_tokens else self.shift
        part = slice(first - shift, max(stop, first) - shift)
        return self.keys[:, part], self.values[:, part]

    def join(self, a: tuple[int, int], b: tuple[int, int]) -> Pair:
        """Two position ranges side by side, [Hg, n, D]; views where they touch."""
        (a0, a1), (b0, b1) = a, b
        if a1 <= a0:
            return self.columns(b0, b1)
        if b1 <= b0:
            return self.columns(a0, a1)
        if a1 == b0 and (self.shift == 0 or a0 >= self.sink_tokens or b1 <= self.sink_tokens):
            return self.columns(a0, b1)
        return side_by_side(self.columns(a0, a1), self.columns(b0, b1))


def side_by_side(a: Pair, b: Pair) -> Pair:
    """Keys and values of two ranges as one, [Hg, n, D]."""
    return torch.cat((a[0], b[0]), 1), torch.cat((a[1], b[1]), 1)
