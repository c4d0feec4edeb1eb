"""KV memory of the Triton backend: pages of 64 tokens per KV head, taken as tokens come and given back as windows move on.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from moa.errors import ResourceError, UsageError, closest
from moa.kernels.batch import Batch
from moa.kernels.layout import SpanTable
from moa.kernels.memory import KVMemory, SequenceState
from moa.kernels.paged.arena import Arena, Step
from moa.kernels.paged.lists import LAUNCHES, Launches
from moa.kernels.paged.pool import CODES, KVDtype, PageFormat
from moa.spans import SpanRules

# Kernels hold positions in 32 bits, and the widest native window is 2**30.
MOST_TOKENS = 1 << 30


class PagedState(SequenceState):
    """Tokens seen per layer, and the sequence's row in the page tables."""

    def __init__(self, memory: PagedMemory, slot: int, pinned_tokens: int | None) -> None:
        super().__init__([], len(memory.table.layers), pinned_tokens)
        self.slot, self._memory = slot, memory

    def clone(self) -> PagedState:
        """An independent copy, with pages of its own; raises ResourceError, and nothing has changed, if there are too few."""
        other = self._memory._new_state(self.pinned_tokens)
        other.lengths = list(self.lengths)
        try:
            for arena in self._memory.arenas:
                arena.copy(self.slot, other.slot)
        except ResourceError:
            other.release()
            raise
        return other

    def release(self) -> None:
        """Give all pages back."""
        self._memory.give_back(self.slot)


class PagedMemory(KVMemory):
    """Pages of 64 tokens per KV head.

    Args:
        rules, native_windows, table: as for `KVMemory`.
        pages: pages of 64 tokens that the pool of a format holds, storage for all of them taken at once; None for a pool
            that grows. With `kv_dtype` that is the pool of codes, and pages of sinks take storage as they come, up to as many.
        kv_dtype: "int8" or "fp8" (E4M3) stores all but the pages of the sinks quantised, with a scale per token; None
            keeps the model's dtype.
        launches: how a step with prefill and decodes is launched: "auto" together where that is predicted to win, "serial"
            apart, "spread" or "tickets" together.

    Raises:
        UsageError: no such `kv_dtype` or `launches`.
    """

    backend = "triton"

    def __init__(
        self,
        rules: SpanRules,
        native_windows: Sequence[int | None] = (),
        table: SpanTable | None = None,
        *,
        pages: int | None = None,
        kv_dtype: KVDtype | None = None,
        launches: Launches = "auto",
    ) -> None:
        super().__init__(rules, native_windows, table)
        if kv_dtype is not None and kv_dtype not in CODES:
            raise UsageError(
                f"kv_dtype must be one of {', '.join(CODES)} or None, got {kv_dtype!r}{closest(kv_dtype, CODES)}"
            )
        if launches not in LAUNCHES:
            raise UsageError(
                f"launches must be one of {', '.join(LAUNCHES)}, got {launches!r}{closest(launches, LAUNCHES)}"
            )
        self.pages, self.kv_dtype, self.launches = pages, kv_dtype, launches
        self._arenas: dict[PageFormat, Arena] = {}
        self._arena_of: dict[int, Arena] = {}
        self._free_slots: list[int] = []
        self._n_slots = 0

    @property
    def arenas(self) -> tuple[Arena, ...]:
        """One per device, head size and dtype."""
        return tuple(self._arenas.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes of storage for pages, in use (`kv_bytes`) or free."""
        pools = {id(pool): pool for arena in self.arenas for pool in (arena.pool, arena.coded)}
        return sum(pool.pages * pool.form.page_bytes for pool in pools.values())

    def fresh(self) -> Self:
        """Empty memory of the same kind under the same plan, which shares what was computed from the plan."""
        return type(self)(
            self.rules, table=self.table, pages=self.pages, kv_dtype=self.kv_dtype, launches=self.launches
        )

    def select(self, sources: Sequence[int]) -> None:
        """Make sequence i a copy of what sequence `sources[i]` was, and forget all others (beam search).

        Raises:
            ResourceError: a pool of fixed size has no room for the copies; nothing has changed.
        """
        copied = [self._paged(source).slot for i, source in enumerate(sources) if source in sources[:i]]
        dropped = [self._paged(sequence).slot for sequence in set(self.sequences) - set(sources)]
        for arena in self.arenas:
            arena.require_copies(copied, dropped)
        super().select(sources)

    def stored_tokens(self, sequence: int, layer: int) -> list[int]:
        """Tokens of the sequence that later queries can need, per KV head; pages round up to 64."""
        state = self.state(sequence)
        length, rules = state.lengths[layer], self.table.rule_of_head[layer].tolist()
        return [self.table.live_tokens(rule, length, state.pinned_tokens) for rule in rules]

    def step(self, layer: int, k: torch.Tensor, batch: Batch) -> tuple[Arena, Step]:
        """The arena of a layer and the batch made ready in it, once for all layers that stand at the same tokens.

        Args:
            layer: index of the layer.
            k: keys of the step [T, HKV, D].
            batch: the batch; each slice continues its sequence.

        Raises:
            ResourceError: a pool of fixed size is full; nothing has changed.
            ValueError: a sequence is too long.
        """
        arena = self._arena(layer, PageFormat(k.shape[2], k.dtype, k.device))
        step = arena.step
        if step is None or step.batch is not batch or layer not in step.pending:
            _check_lengths(batch)
            states = [self._paged(sequence) for sequence in batch.sequences]
            layers = [
                i
                for i in range(len(self.table.layers))
                if self._arena_of.get(i, arena) is arena and self.lengths(batch.sequences, i) == batch.positions
            ]
            slots, pinned = [s.slot for s in states], [s.pinned_tokens or 0 for s in states]
            step = arena.prepare(batch, slots, pinned, layers)
        return arena, step

    def finish(self, layer: int, arena: Arena, step: Step) -> None:
        """Count the tokens of a step that a layer has run; the last layer gives pages back."""
        for item in step.batch.slices:
            self.state(item.sequence).lengths[layer] += item.tokens
        step.pending.discard(layer)
        if not step.pending:
            arena.finish(step)

    def give_back(self, slot: int) -> None:
        """Take a slot out of use."""
        for arena in self.arenas:
            arena.drop(slot)
        self._free_slots.append(slot)

    def _new_state(self, pinned_tokens: int | None) -> PagedState:
        if not self._free_slots:
            self._free_slots.append(self._n_slots)
            self._n_slots += 1
        return PagedState(self, self._free_slots.pop(), pinned_tokens)

    def _paged(self, sequence: int) -> PagedState:
        state = self.state(sequence)
        if not isinstance(state, PagedState):
            raise TypeError(f"sequence {sequence} is not held in pages")
        return state

    def _arena(self, layer: int, form: PageFormat) -> Arena:
        """The arena of a layer. Until it is seen, a layer is taken to be like those before it."""
        arena = self._arena_of.get(layer)
        if arena is None or arena.form != form:
            arena = self._arenas.get(form)
            if arena is None:
                arena = self._arenas[form] = Arena(self.table, form, self.kv_dtype, self.pages, self.bytes)
            for other in self.arenas:
                for slot in range(self._n_slots) if other is not arena else ():
                    other.drop(slot, layer)
            self._arena_of[layer] = arena
        return arena


def _check_lengths(batch: Batch) -> None:
    for item in batch.slices:
        if item.position + item.tokens > MOST_TOKENS:
            raise ValueError(
                f"batch: the Triton backend takes sequences of up to {MOST_TOKENS} tokens, sequence {item.sequence} "
                f"would have {item.position + item.tokens}"
            )
