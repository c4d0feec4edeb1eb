"""Pages, page table and rules of the layers that share a device, a head size and a dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from moa.kernels.batch import Batch
from moa.kernels.layout import SpanTable
from moa.kernels.paged.launch import Heads, Pools
from moa.kernels.paged.lists import Lists
from moa.kernels.paged.page_table import NONE, BoolArray, Entries, PageTable
from moa.kernels.paged.pool import CODES, Int32Array, KVDtype, PageFormat, PagePool
from moa.kernels.paged.splits import HeadRules
from moa.kernels.storage import ByteCount
from moa.spans import Int64Array


@dataclass(slots=True, eq=False)  # arrays have no single truth value to compare by
class Step:
    """A batch made ready for the layers of an arena: its pages are taken, its account lies on the device.

    Args:
        batch: the batch.
        slots: rows of the page table, [S].
        pinned: pinned lengths, 0 for running ones, [S].
        pending: layers that have yet to run it.
        heads: rows of their heads in the page table.
        account: offset, tokens, position and slot, int32 [S, 4].
        slices: the same on the device.
        pinned_on_device: int64 [S].
        lists: work lists by group of query heads, made by whoever launches.
    """

    batch: Batch
    slots: Int64Array
    pinned: Int64Array
    pending: set[int]
    heads: Int64Array
    account: Int32Array
    slices: torch.Tensor
    pinned_on_device: torch.Tensor
    lists: dict[int, Lists] = field(default_factory=dict)

    @property
    def ends(self) -> Int64Array:
        """Tokens of each sequence after the step, [S]."""
        return np.array([item.position + item.tokens for item in self.batch.slices], dtype=np.int64)


class Arena:
    """What the layers of one format share.

    Args:
        spans: rules of all layers.
        form: what a page in the model's dtype holds.
        kv_dtype: what keys and values beyond the pages of the sinks are quantised to; None for not at all.
        pages: pages of a pool of fixed size; None for pools that grow. Where keys and values are quantised, the few pages
            of the sinks take storage as they come.
        count: where bytes of pages are counted.
    """

    def __init__(
        self, spans: SpanTable, form: PageFormat, kv_dtype: KVDtype | None, pages: int | None, count: ByteCount
    ) -> None:
        self.form, self.spans = form, spans
        self.table = PageTable(spans, form.device)
        self.pool = PagePool(form, pages, count, at_once=kv_dtype is None)
        self.coded = self.pool
        if kv_dtype is not None:
            self.coded = PagePool(form._replace(dtype=CODES[kv_dtype], scaled=True), pages, count)
        limits = spans.sink_tokens, spans.min_span_tokens
        self.rules = HeadRules(spans.rules, spans.rule_of_head.astype(np.int32), *limits)
        rules, rule_of_head = (torch.from_numpy(x).to(form.device) for x in (self.rules.rules, self.rules.rule_of_head))
        self.heads = Heads(rules, rule_of_head, *limits)
        self.step: Step | None = None

    @property
    def pools(self) -> Pools:
        """Storage as kernels read it."""
        keys, values = self.pool.keys, self.pool.values
        if self.coded is self.pool or self.coded.scales is None:
            return Pools(keys, values)
        return Pools(keys, values, (self.coded.keys, self.coded.values, *self.coded.scales))

    def prepare(self, batch: Batch, slots: list[int], pinned: list[int], layers: list[int]) -> Step:
        """Take the pages that survivors of a batch need in `layers`, and lay its account on the device.

        Raises:
            ResourceError: a pool of fixed size is full; nothing has changed.
        """
        n_heads = self.spans.rule_of_head.shape[1]
        heads = (np.array(layers, dtype=np.int64)[:, None] * n_heads + np.arange(n_heads)).reshape(-1)
        account = np.array([s[1:] for s in batch.slices], dtype=np.int64).reshape(-1, 3)  # offset, tokens, position
        at, lengths = np.array(slots, dtype=np.int64), np.array(pinned, dtype=np.int64)
        self._take(self.table.wanted(at, account[:, 2], account[:, 1] + account[:, 2], lengths, heads))
        slices = np.column_stack((account, at)).astype(np.int32)
        slices_on_device, on_device = (torch.from_numpy(x).to(self.form.device) for x in (slices, lengths))
        self.step = Step(batch, at, lengths, set(layers), heads, slices, slices_on_device, on_device)
        return self.step

    def finish(self, step: Step) -> None:
        """Give back what no later query sees, once all layers have run a step: before, pages may still be read."""
        self._give(self.table.expired(step.slots, step.ends, step.pinned, step.heads))

    def drop(self, slot: int, layer: int | None = None) -> None:
        """Give back all pages of a slot, or those of one layer."""
        self.step = None
        if slot >= len(self.table.entries):
            return
        n_layers, n_heads = self.spans.rule_of_head.shape
        first, count = (0, n_layers * n_heads) if layer is None else (layer * n_heads, n_heads)
        self._give(self.table.held(slot, np.arange(first, first + count)))
        if layer is None:
            self.table.reset(slot)

    def require_copies(self, copied: list[int], dropped: list[int]) -> None:
        """Make sure that slots can be copied once others are dropped.

        Raises:
            ResourceError: a pool of fixed size has too few pages; nothing has changed.
        """
        heads = np.arange(self.table.entries.shape[1])
        for pool in {id(pool): pool for pool in (self.pool, self.coded)}.values():
            count = [
                sum(int(chosen.sum()) for slot in slots for p, chosen in self._held_by_pool(slot, heads) if p is pool)
                for slots in (copied, dropped)
            ]
            pool.require(max(0, count[0] - count[1]))

    def copy(self, source: int, target: int) -> None:
        """Make a slot, which holds nothing, a copy of another."""
        self.step = None
        if source >= len(self.table.entries):
            return
        held = self.table.held(source, np.arange(self.table.entries.shape[1]))
        self.table.follow(target, source)
        shift = (target - source) * self.table.entries.shape[1]
        copies = Entries(held.rows + shift, held.columns)
        sources = self.table.pages(held)
        self._take(copies)
        targets = self.table.pages(copies)
        for pool, chosen in self._by_pool(held):
            pool.copy(sources[chosen], targets[chosen])

    def _held_by_pool(self, slot: int, heads: Int64Array) -> list[tuple[PagePool, BoolArray]]:
        return self._by_pool(self.table.held(slot, heads)) if slot < len(self.table.entries) else []

    def _take(self, at: Entries) -> None:
        parts = self._by_pool(at)
        for pool, chosen in parts:
            pool.require(int(chosen.sum()))
        for pool, chosen in parts:
            mine = Entries(at.rows[chosen], at.columns[chosen])
            self.table.put(mine, pool.take(len(mine.rows)))

    def _give(self, at: Entries) -> None:
        pages = self.table.pages(at)
        self.table.put(at, NONE)
        for pool, chosen in self._by_pool(at):
            pool.give(pages[chosen])

    def _by_pool(self, at: Entries) -> list[tuple[PagePool, BoolArray]]:
        """Which entries lie in which pool."""
        if self.coded is self.pool:
            return [(self.pool, np.ones(len(at.rows), dtype=np.bool_))]
        sinks = at.columns < self.table.sink_pages
        return [(self.pool, sinks), (self.coded, ~sinks)]
