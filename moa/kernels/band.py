"""What a chunk of queries attends to in one rule group: keys and values in order of position, and who sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moa.kernels.scores import Scores
from moa.spans import Int64Array


@dataclass(frozen=True, slots=True)
class Band:
    """Keys and values of one rule group in order of position, and who sees them.

    Args:
        tokens: keys and values [2, Hg, N, D]; columns `[0, sink)` are positions `[0, sink)`.
        shift: a window position j lies in column `j - shift`.
        position: absolute position of the first query.
        starts: `lo(p)` of each query, int64 [T].
        sink_tokens: first tokens that every query sees.
        native_window: the layer's own sliding window in tokens.
        scores: how keys are scored, with sinks [Hg, G], if any.
    """

    tokens: torch.Tensor
    shift: int
    position: int
    starts: Int64Array
    sink_tokens: int
    native_window: int | None
    scores: Scores

    def columns(self, first: int, stop: int) -> torch.Tensor:
        """Keys and values at positions `[first, stop)`, all of one kind: a view [2, Hg, n, D]."""
        shift = 0 if first < self.sink_tokens else self.shift
        return self.tokens[:, :, first - shift : max(stop, first) - shift]

    def join(self, a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        """Two position ranges side by side, [2, Hg, n, D]; a view where they touch."""
        (a0, a1), (b0, b1) = a, b
        if a1 <= a0:
            return self.columns(b0, b1)
        if b1 <= b0:
            return self.columns(a0, a1)
        if a1 == b0 and (self.shift == 0 or a0 >= self.sink_tokens or b1 <= self.sink_tokens):
            return self.columns(a0, b1)
        return torch.cat((self.columns(a0, a1), self.columns(b0, b1)), 2)
