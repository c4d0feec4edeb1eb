"""Which page holds which tokens: kept on the host, with a copy on the device that learns what changed.

The table has an entry for every 64 tokens of every sequence and KV head, -1 where they have no page. Pages of sinks and of
the window are taken when the first token that survives a step falls into them, and given back when the window of the last
query has left them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moa.kernels.layout import SpanTable
from moa.kernels.paged.pool import PAGE_TOKENS, Int32Array
from moa.spans import Int64Array

NONE = -1
WIDTH_STEP = 16  # entries that a row of the table grows by, so that it rarely does
BoolArray = npt.NDArray[np.bool_]


class Entries(NamedTuple):
    """Entries of the table: their rows (slot * heads + head) and columns, int64 each."""

    rows: Int64Array
    columns: Int64Array


def expand(firsts: Int64Array, stops: Int64Array, rows: Int64Array) -> Entries:
    """All columns of the ranges [first, stop), each in its row; the arrays are broadcast to one shape."""
    firsts, stops, rows = (x.reshape(-1) for x in np.broadcast_arrays(firsts, stops, rows))
    counts = np.maximum(stops - firsts, 0)
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return Entries(np.repeat(rows, counts), np.repeat(firsts, counts) + within)


class PageTable:
    """The table of one arena: all KV heads of all layers, for any number of slots."""

    def __init__(self, spans: SpanTable, device: torch.device) -> None:
        self._spans, self._rule = spans, spans.rule_of_head.reshape(-1)  # [H], H = L * HKV
        self._has_native = any(spans.native_window(rule) is not None for rule in range(len(spans.rules)))
        self.sink_pages = -(-spans.sink_tokens // PAGE_TOKENS)
        self.entries: Int32Array = np.full((0, len(self._rule), 0), NONE, dtype=np.int32)
        self._first = np.zeros((0, len(self._rule)), dtype=np.int64)  # pages of the window before it were given back
        self._first_sink = np.zeros((0, len(self._rule)), dtype=np.int64)
        self._device_table = torch.empty(0, dtype=torch.int32, device=device)
        self._changed: list[Int64Array] = []

    def wanted(
        self, slots: Int64Array, starts: Int64Array, ends: Int64Array, pinned: Int64Array, heads: Int64Array
    ) -> Entries:
        """Entries without a page that survivors of tokens [start, end) fall into; arrays [S], heads [H']."""
        self._widen(int(slots.max(initial=-1)) + 1, -(-int(ends.max(initial=0)) // PAGE_TOKENS))
        # Within the page of the token before it, every token finds room: the last token always survives.
        moving = (starts % PAGE_TOKENS == 0) | (starts // PAGE_TOKENS != (ends - 1) // PAGE_TOKENS)
        slots, starts, ends, pinned = slots[moving], starts[moving], ends[moving], pinned[moving]
        low = self._spans.starts_of(ends - 1, pinned)[self._rule[heads]].T  # [S, H']
        sinks = -(-np.minimum(ends, self._spans.sink_tokens) // PAGE_TOKENS)[:, None]
        first = np.maximum(np.maximum(low, starts[:, None]) // PAGE_TOKENS, sinks)
        rows = slots[:, None] * len(self._rule) + heads
        window = expand(first, -(-ends[:, None] // PAGE_TOKENS), rows)
        sink = expand(starts[:, None] // PAGE_TOKENS, sinks, rows)
        found = Entries(np.concatenate((sink.rows, window.rows)), np.concatenate((sink.columns, window.columns)))
        return self._those(found, held=False)

    def expired(self, slots: Int64Array, ends: Int64Array, pinned: Int64Array, heads: Int64Array) -> Entries:
        """Entries with a page that no query from `ends - 1` on sees; they are told once."""
        low = self._spans.starts_of(ends - 1, pinned)[self._rule[heads]].T  # [S, H']
        rows, here = slots[:, None] * len(self._rule) + heads, np.ix_(slots, heads)
        first = np.maximum(low // PAGE_TOKENS, self._first[here])
        found = expand(self._first[here], first, rows)
        self._first[here] = first
        if self._has_native:
            seen = ends[:, None] - self._spans.rules[self._rule[heads], 2]
            # The page that the last sinks share with other tokens goes when both have left.
            gone = np.where(seen < self._spans.sink_tokens, seen, low) // PAGE_TOKENS
            first = np.clip(gone, self._first_sink[here], self.sink_pages)
            sinks = expand(self._first_sink[here], first, rows)
            self._first_sink[here] = first
            found = Entries(np.concatenate((sinks.rows, found.rows)), np.concatenate((sinks.columns, found.columns)))
        return self._those(found, held=True)

    def held(self, slot: int, heads: Int64Array) -> Entries:
        """Entries of a slot with a page."""
        rows, columns = np.nonzero(self.entries[slot, heads] != NONE)
        return Entries(slot * len(self._rule) + heads[rows], columns)

    def pages(self, at: Entries) -> Int32Array:
        """Pages of entries."""
        pages: Int32Array = self._flat[at.rows * self.entries.shape[2] + at.columns]
        return pages

    def put(self, at: Entries, pages: Int32Array | int) -> None:
        """Set entries."""
        flat = at.rows * self.entries.shape[2] + at.columns
        self._flat[flat] = pages
        self._changed.append(flat)

    def reset(self, slot: int) -> None:
        """Begin a slot anew; its pages have been given back."""
        self._widen(slot + 1, 0)
        self._first[slot], self._first_sink[slot] = self.sink_pages, 0

    def follow(self, slot: int, source: int) -> None:
        """Give back what `source` gives back from now on; its pages have been copied."""
        self._widen(slot + 1, 0)
        self._first[slot], self._first_sink[slot] = self._first[source], self._first_sink[source]

    def on_device(self, sink_pool: int, window_pool: int) -> torch.Tensor:
        """The table int32 [slots, H, width] where kernels read it, up to date.

        Args:
            sink_pool: pages of the pool that entries of sinks point to.
            window_pool: pages of the pool of all others.

        Raises:
            ValueError: an entry points outside of its pool, where kernels would read what is not theirs.
        """
        if self._device_table.shape != self.entries.shape:
            self._check(np.arange(self.entries.size), sink_pool, window_pool)
            with torch.inference_mode(False):
                self._device_table = torch.from_numpy(self.entries.copy()).to(self._device_table.device)
        elif self._changed:
            flat = np.unique(np.concatenate(self._changed))
            self._check(flat, sink_pool, window_pool)
            at, pages = (torch.from_numpy(x).to(self._device_table.device) for x in (flat, self._flat[flat]))
            self._device_table.view(-1)[at] = pages
        self._changed.clear()
        return self._device_table

    def _check(self, flat: Int64Array, sink_pool: int, window_pool: int) -> None:
        """Check the entries at `flat`, which are about to go to the device."""
        pages = self._flat[flat]
        limits = np.where(flat % self.entries.shape[2] < self.sink_pages, sink_pool, window_pool)
        wrong = np.flatnonzero((pages < NONE) | (pages >= limits))
        if len(wrong):
            slot, head, column = np.unravel_index(int(flat[wrong[0]]), self.entries.shape)
            raise ValueError(
                f"kv: the page table of slot {slot}, head {head} points to page {pages[wrong[0]]} for tokens from "
                f"{column * PAGE_TOKENS} on, its pool has {limits[wrong[0]]} pages; this memory is damaged, make a new one"
            )

    @property
    def _flat(self) -> Int32Array:
        return self.entries.reshape(-1)

    def _those(self, found: Entries, held: bool) -> Entries:
        chosen = (self.pages(found) != NONE) == held
        return Entries(found.rows[chosen], found.columns[chosen])

    def _widen(self, slots: int, width: int) -> None:
        old_slots, heads, old_width = self.entries.shape
        if slots <= old_slots and width <= old_width:
            return
        slots, width = max(slots, old_slots), max(old_width, -(-width // WIDTH_STEP) * WIDTH_STEP)
        width = width if width == old_width else max(width, old_width + old_width // 2)
        slots = slots if slots == old_slots else max(slots, 2 * old_slots)
        entries = np.full((slots, heads, width), NONE, dtype=np.int32)
        entries[:old_slots, :, :old_width] = self.entries
        more = ((0, slots - old_slots), (0, 0))
        self._first = np.pad(self._first, more, constant_values=self.sink_pages)
        self._first_sink = np.pad(self._first_sink, more)
        self.entries = entries
        self._changed.clear()  # the device gets the whole table
