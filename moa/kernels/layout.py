"""Which KV heads of a layer share a rule, and where each rule's window begins: computed once, asked every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from moa.spans import MAX_TOKENS, Int64Array, SpanRules

# Window starts are computed for so many positions at once, so that a decode step costs a list lookup.
POSITIONS_AHEAD = 64


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """KV heads `[first, stop)` of a layer, in grouped order, and their row in the span table."""

    rule: int
    first: int
    stop: int


class LayerLayout:
    """The KV heads of one layer, sorted so that heads with one rule lie together."""

    def __init__(self, rule_of_head: Sequence[int]) -> None:
        heads = sorted(range(len(rule_of_head)), key=lambda h: (rule_of_head[h], h))
        self.order = tuple(heads)
        self.inverse = tuple(sorted(range(len(heads)), key=lambda i: heads[i]))
        self.is_sorted = self.order == self.inverse == tuple(range(len(heads)))
        self.groups = tuple(_runs([rule_of_head[h] for h in heads]))
        self._indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`order` and `inverse` as int64 tensors [HKV] on `device`."""
        if device not in self._indices:
            with torch.inference_mode(False):  # autograd takes no tensors of inference mode, and these are kept
                self._indices[device] = (
                    torch.tensor(self.order, device=device),
                    torch.tensor(self.inverse, device=device),
                )
        return self._indices[device]


def _runs(rules: Sequence[int]) -> list[HeadGroup]:
    bounds = [i for i in range(len(rules)) if i == 0 or rules[i] != rules[i - 1]] + [len(rules)]
    return [HeadGroup(rules[a], a, b) for a, b in pairwise(bounds)]


class SpanTable:
    """The distinct rules of a model, with each layer's heads grouped by rule.

    A layer's native sliding window `w` composes: a query at p sees a key j only if the rule keeps it and `p - j < w`.
    Both limits only ever move forward, so what was dropped stays unneeded.

    Args:
        rules: spans of all layers and KV heads.
        native_windows: the model's own window per layer in tokens, None where a layer has none; empty for no windows.

    Raises:
        ValueError: `native_windows` does not fit the layers, or a window is below 1.
    """

    def __init__(self, rules: SpanRules, native_windows: Sequence[int | None] = ()) -> None:
        windows = [w if w is not None else MAX_TOKENS for w in native_windows or [None] * rules.alpha.shape[0]]
        if len(windows) != rules.alpha.shape[0] or min(windows, default=1) < 1:
            raise ValueError(
                f"native_windows must hold {rules.alpha.shape[0]} windows of at least 1 token or None, one per layer of the "
                f"rules, got {list(native_windows)}"
            )
        native = np.broadcast_to(np.array(windows, dtype=np.int64)[:, None], rules.alpha.shape)
        keys = np.stack([rules.alpha, rules.beta_fixed, native], axis=-1).reshape(-1, 3)  # [L*HKV, 3]
        distinct, rule_of = np.unique(keys, axis=0, return_inverse=True)
        self.rules: Int64Array = distinct  # alpha, beta in 1/65536 and native window in tokens, [R, 3]
        self.rule_of_head: Int64Array = rule_of.reshape(rules.alpha.shape)  # [L, HKV]
        self.sink_tokens, self.min_span_tokens = rules.sink_tokens, rules.min_span_tokens
        self.is_pinned = rules.length_mode == "pinned"
        self._native = [int(w) if w < MAX_TOKENS else None for w in distinct[:, 2]]
        self._limit = distinct[:, 2:]  # [R, 1]
        self._rules = SpanRules(
            alpha=distinct[None, :, 0],
            beta_fixed=distinct[None, :, 1],
            sink_tokens=rules.sink_tokens,
            min_span_tokens=rules.min_span_tokens,
            length_mode=rules.length_mode,
        )
        self.layers = tuple(LayerLayout([int(r) for r in row]) for row in self.rule_of_head)
        self._block = lru_cache(maxsize=256)(self._make_block)

    def __deepcopy__(self, memo: object) -> SpanTable:
        """Itself, since nothing changes it: copies of a cache know by it that they are of one attachment."""
        return self

    def starts(self, position: int, count: int, pinned_tokens: int | None = None) -> Int64Array:
        """Window starts lo(p) of `count` positions from `position` on: int64 [R, count]."""
        positions = np.arange(position, position + count, dtype=np.int64)
        starts = self._rules.window_start(positions, pinned_tokens)[0]  # [R, count]
        limited: Int64Array = np.maximum(starts, positions + 1 - self._limit)
        return limited

    def starts_of(self, positions: Int64Array, pinned_tokens: Int64Array) -> Int64Array:
        """Window starts lo(p) of one position in each of S sequences: int64 [R, S]; pinned lengths are 0 if running."""
        if self.is_pinned:
            each = [self._rules.window_start(p, int(n))[0] for p, n in zip(positions, pinned_tokens, strict=True)]
            starts = np.stack(each, 1) if each else np.empty((len(self.rules), 0), dtype=np.int64)
        else:
            starts = self._rules.window_start(positions)[0]
        limited: Int64Array = np.maximum(starts, positions + 1 - self._limit)
        return limited

    def starts_at(self, position: int, pinned_tokens: int | None = None) -> list[int]:
        """Window starts lo(p) of one position, one per rule; looked up."""
        block, i = divmod(position, POSITIONS_AHEAD)
        return self._block(block, pinned_tokens)[i]

    def _make_block(self, block: int, pinned_tokens: int | None) -> list[list[int]]:
        starts: list[list[int]] = self.starts(block * POSITIONS_AHEAD, POSITIONS_AHEAD, pinned_tokens).T.tolist()
        return starts

    def native_window(self, rule: int) -> int | None:
        """The model's own window that composes with a rule, in tokens."""
        return self._native[rule]

    def sink_start(self, rule: int, position: int) -> int:
        """The first sink that a query at `position` still sees; 0 without a native window."""
        native = self._native[rule]
        return 0 if native is None else max(0, min(self.sink_tokens, position + 1 - native))

    def live_tokens(self, rule: int, length: int, pinned_tokens: int | None = None) -> int:
        """Tokens stored after `length` tokens: all sinks seen, and the window of the last query."""
        if length == 0:
            return 0
        start = self.starts_at(length - 1, pinned_tokens)[rule]
        return min(length, self.sink_tokens) + max(0, length - start)
