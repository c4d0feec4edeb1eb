"""The account of KV memory across requests: it knows from the spans alone how much each request holds, now and later.

Counted in slots: room for `page_tokens` tokens of one KV head of one layer. No tensor is seen here, so that the
simulator keeps the same account.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moa.errors import ResourceError
from moa.spans import MAX_TOKENS, Int64Array, SpanRules


class Footprint:
    """Slots that one sequence of a given length holds under a plan.

    Args:
        rules: spans of all layers and KV heads.
        native_windows: the model's own sliding window per layer in tokens, None where a layer has none.
        page_tokens: tokens per slot: 64 in pages, 1 where tokens lie in a row.
    """

    def __init__(self, rules: SpanRules, native_windows: Sequence[int | None] = (), page_tokens: int = 1) -> None:
        windows = [w if w is not None else MAX_TOKENS for w in native_windows or [None] * rules.alpha.shape[0]]
        native = np.broadcast_to(np.array(windows, dtype=np.int64)[:, None], rules.alpha.shape)
        keys = np.stack([rules.alpha, rules.beta_fixed, native], axis=-1).reshape(-1, 3)  # [L*HKV, 3]
        distinct, counts = np.unique(keys, axis=0, return_counts=True)
        self.heads, self.page_tokens, self.is_pinned = len(keys), page_tokens, rules.length_mode == "pinned"
        self._counts, self._native = counts.astype(np.int64), distinct[:, 2:]  # [R], [R, 1]
        self._sinks = rules.sink_tokens
        self._rules = SpanRules(
            alpha=distinct[None, :, 0],
            beta_fixed=distinct[None, :, 1],
            sink_tokens=rules.sink_tokens,
            min_span_tokens=rules.min_span_tokens,
            length_mode=rules.length_mode,
        )

    def held(self, lengths: Int64Array, pinned: Sequence[int | None]) -> Int64Array:
        """Slots held after a step has brought sequences to `lengths` [S] -> [S]; 0 for none."""
        sinks, low = self._sinks_of(lengths), self._low(lengths, pinned)  # [S], [R, S]
        window = np.maximum(self._up(lengths) - np.maximum(low // self.page_tokens, sinks), 0)
        return self._total(window + sinks, lengths)

    def during(self, starts: Int64Array, ends: Int64Array, pinned: Sequence[int | None]) -> Int64Array:
        """Slots held while a step brings sequences from `starts` [S] to `ends`.

        Pages that survive a step are taken before it gives back what it leaves behind. Where tokens lie in a row, one
        layer after the other does both, so that only a layer's chunk is held beside; that is working memory of the step.
        """
        if self.page_tokens == 1:
            return np.maximum(self.held(starts, pinned), self.held(ends, pinned))
        sinks = self._sinks_of(ends)
        first = np.maximum(np.maximum(self._low(ends, pinned) // self.page_tokens, self._up(starts)), sinks)
        fresh = np.maximum(self._up(ends) - first, 0) + (sinks - self._sinks_of(starts))
        return self.held(starts, pinned) + self._total(fresh, ends)

    def most(self, length: int, pinned: int | None = None) -> int:
        """Slots that are always enough for a sequence on its way to `length`, a few tokens at a time."""
        n = np.array([length], dtype=np.int64)
        if self.page_tokens == 1:
            return int(self.held(n, (pinned,))[0])
        window = n - self._low(n, (pinned,))  # [R, 1] tokens
        # A window lies across one page more than it fills, and takes the next before it gives one back.
        wanted = self._up(window) + 2 + self._up(np.array([self._sinks]))
        return int(self._total(np.minimum(wanted, self._up(n)), n)[0])

    def _low(self, lengths: Int64Array, pinned: Sequence[int | None]) -> Int64Array:
        """Window starts of the last query of sequences of `lengths` [S]: [R, S]."""
        last = lengths - 1
        if self.is_pinned:
            each = [self._rules.window_start(p, n)[0] for p, n in zip(last, pinned, strict=True)]
            starts = np.stack(each, 1)
        else:
            starts = self._rules.window_start(last)[0]
        limited: Int64Array = np.maximum(starts, lengths - self._native)
        return limited

    def _sinks_of(self, lengths: Int64Array) -> Int64Array:
        return self._up(np.minimum(lengths, self._sinks))

    def _up(self, tokens: Int64Array) -> Int64Array:
        return -(-tokens // self.page_tokens)

    def _total(self, slots: Int64Array, lengths: Int64Array) -> Int64Array:
        total: Int64Array = np.where(lengths > 0, self._counts @ slots, 0)
        return total


class KVAccount:
    """Who holds how many slots of how many.

    Args:
        footprint: slots by length.
        total_slots: there are; None for no limit.
    """

    def __init__(self, footprint: Footprint, total_slots: int | None = None) -> None:
        self.footprint, self.total_slots = footprint, total_slots
        self.used_slots = 0
        self._held: dict[int, int] = {}

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return MAX_TOKENS if self.total_slots is None else self.total_slots - self.used_slots

    @property
    def usage_ratio(self) -> float:
        """Share of the slots that is held; 0 without a limit."""
        return self.used_slots / self.total_slots if self.total_slots else 0.0

    @property
    def holders(self) -> int:
        """How many hold something."""
        return len(self._held)

    def held(self, holder: int) -> int:
        """Slots of one holder."""
        return self._held.get(holder, 0)

    def require_possible(self, prompt_tokens: int, most_tokens: int, pinned: int | None = None) -> None:
        """Refuse a sequence that could not be finished if it were alone.

        Raises:
            ResourceError: with the numbers.
        """
        wanted = self.footprint.most(most_tokens, pinned)
        if self.total_slots is not None and wanted > self.total_slots:
            page, heads = self.footprint.page_tokens, self.footprint.heads
            raise ResourceError(
                f"a prompt of {prompt_tokens} tokens that may grow to {most_tokens} can need KV memory for "
                f"{wanted * page} tokens summed over {heads} KV heads, there is room for {self.total_slots * page}; "
                "shorten the prompt, lower max_tokens, or give the engine more KV memory"
            )

    def set(self, holder: int, slots: int) -> bool:
        """Let a holder have so many slots, more or fewer than before; False where there are too few, nothing changed."""
        more = slots - self._held.get(holder, 0)
        if more > 0 and more > self.free_slots:
            return False
        self.used_slots += more
        self._held[holder] = slots
        return True

    def release(self, holder: int) -> None:
        """Take back all that a holder has."""
        self.used_slots -= self._held.pop(holder, 0)
