"""KV memory per sequence, layer and rule group: holds exactly the tokens a span keeps, and frees the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import ClassVar, Self

import torch

from moa.kernels.layout import HeadGroup, SpanTable
from moa.spans import SpanRules

# Storage is reserved for the tokens that will be live so many tokens on: heads whose span stands still get no slack,
# growing ones at most 1.5 %, which keeps measured bytes within 2 % of computed ones.
SMALL_TOKENS, SMALL_STEP, SLACK_PERCENT = 128, 16, 1.5


def reserve_ahead(live_tokens: int) -> int:
    """How many tokens ahead storage is reserved for."""
    return SMALL_STEP if live_tokens < SMALL_TOKENS else max(2, int(live_tokens * SLACK_PERCENT / 100))


class ByteCount:
    """Bytes allocated for keys and values; outlives the memory that it counts, so that it can be read afterwards."""

    def __init__(self) -> None:
        self.allocated = 0


class GroupState:
    """Live keys and values of the KV heads that share a rule, for one sequence and layer.

    Slots `[0, sinks)` hold the sinks, the rest the window. A dropped token's slot takes the next token, so the window
    is unordered (keys carry their rotary position); `_ring` lists its slots by age from `_oldest` on, None while they
    still lie in order.
    """

    __slots__ = ("_bytes", "_oldest", "_ring", "_seen", "_views", "data", "live", "window_from")

    def __init__(self, count: ByteCount) -> None:
        self.data = torch.empty(2, 0, 0, 0)  # [2, Hg, capacity, D]; no capacity yet
        self.live = 0
        self.window_from = 0
        self._ring: array[int] | None = None
        self._oldest = 0
        self._bytes = count
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seen = (0, 0)

    def clone(self) -> GroupState:
        """An independent copy, with storage of its own."""
        other = GroupState(self._bytes)
        other.live, other.window_from, other._oldest = self.live, self.window_from, self._oldest
        other._ring = None if self._ring is None else self._ring[:]
        with torch.inference_mode(False):
            other._place(self.data.clone())
        return other

    def release(self) -> None:
        """Give the storage back."""
        self._place(self.data.new_empty(2, 0, 0, 0))  # [2, Hg, capacity, D]
        self._ring, self.live = None, 0

    def append(self, token: torch.Tensor, window_from: int, sink_tokens: int) -> None:
        """Store one token [2, Hg, D] for a query whose window begins at `window_from`, over the one that left.

        The caller has reserved a slot where the window grows.
        """
        if window_from == self.window_from:
            slot = self._add_slot()
        elif window_from == self.window_from + 1:
            slot = self._take_oldest(sink_tokens)
        else:
            raise ValueError(f"a window start moved from {self.window_from} to {window_from} in one token")
        self.data[:, :, slot] = token
        self.window_from = window_from

    def needs_slot(self, window_from: int) -> bool:
        """Whether the next token finds no room."""
        return window_from == self.window_from and self.live == self.data.shape[2]

    def reserve(self, capacity: int, like: torch.Tensor) -> None:
        """Move to storage of `capacity` slots; `like` [2, Hg, D] gives heads, size, dtype and device."""
        data = _allocate(like, capacity)  # [2, Hg, capacity, D]
        if self.live:
            data[:, :, : self.live] = self.data[:, :, : self.live]
        self._place(data)

    def replace(self, tokens: torch.Tensor, window_from: int, capacity: int) -> None:
        """Hold `tokens` [2, Hg, live, D], sinks first and the window in order of position."""
        live = tokens.shape[2]
        if not live <= self.data.shape[2] <= capacity:
            self._place(_allocate(tokens, capacity))  # [2, Hg, capacity, D]
        self.data[:, :, :live] = tokens.detach()
        self.live, self.window_from, self._ring, self._oldest = live, window_from, None, 0

    def in_order(self, sink_tokens: int) -> torch.Tensor | None:
        """The live tokens sorted by position, [2, Hg, live, D]; a view where they lie in order, None if there are none."""
        if self.live == 0:
            return None
        if self._ring is None:
            return self.data[:, :, : self.live]
        slots = [*range(sink_tokens), *self._ring[self._oldest :], *self._ring[: self._oldest]]
        return self.data.index_select(2, torch.tensor(slots, device=self.data.device))  # [2, Hg, live, D]

    def views(self, first_slot: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in slots `[first_slot, live)`, each [1, Hg, live - first_slot, D]; kept while nothing moves."""
        if self._views is None or self._seen != (first_slot, self.live):
            live = self.data[:, None, :, first_slot : self.live]  # [2, 1, Hg, live, D]
            self._views, self._seen = (live[0], live[1]), (first_slot, self.live)
        return self._views

    def _place(self, data: torch.Tensor) -> None:
        self._bytes.allocated += data.nbytes - self.data.nbytes
        self.data, self._views = data, None

    def _add_slot(self) -> int:
        slot, ring = self.live, self._ring
        self.live += 1
        if ring is not None and self._oldest == 0:
            ring.append(slot)
        elif ring is not None:
            ring.insert(self._oldest, slot)  # just before the oldest: the youngest
            self._oldest += 1
        return slot

    def _take_oldest(self, sink_tokens: int) -> int:
        if self._ring is None:
            self._ring, self._oldest = array("i", range(sink_tokens, self.live)), 0
        slot = self._ring[self._oldest]
        self._oldest = (self._oldest + 1) % len(self._ring)
        return slot


def _allocate(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """Storage [2, Hg, capacity, D] for tokens [2, Hg, ..., D], writable in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(
            *like.shape[:2], capacity, like.shape[-1], dtype=like.dtype, device=like.device
        )  # [2, Hg, capacity, D]


class SequenceState:
    """What one sequence keeps: tokens seen per layer, and a state per layer and rule group."""

    def __init__(self, groups: list[list[GroupState]], pinned_tokens: int | None) -> None:
        self.groups = groups
        self.lengths = [0] * len(groups)
        self.pinned_tokens = pinned_tokens

    def clone(self) -> SequenceState:
        """An independent copy."""
        other = SequenceState([[g.clone() for g in layer] for layer in self.groups], self.pinned_tokens)
        other.lengths = list(self.lengths)
        return other

    def release(self) -> None:
        """Give all storage back."""
        for layer in self.groups:
            for group in layer:
                group.release()


class KVMemory(ABC):
    """Keys and values of any number of sequences under one plan; each backend has its own kind.

    Args:
        rules: spans of all layers and KV heads.
        native_windows: the model's own sliding window per layer in tokens, None where a layer has none.
    """

    backend: ClassVar[str]

    def __init__(
        self, rules: SpanRules, native_windows: Sequence[int | None] = (), table: SpanTable | None = None
    ) -> None:
        self.rules = rules
        self.table = table or SpanTable(rules, native_windows)
        self.bytes = ByteCount()
        self.formats: dict[int, tuple[int, torch.dtype, torch.device]] = {}  # per layer, of the tokens held
        self._sequences: dict[int, SequenceState] = {}

    @property
    def kv_bytes(self) -> int:
        """Bytes of key and value storage really allocated, all sequences and layers together."""
        return self.bytes.allocated

    def fresh(self) -> Self:
        """Empty memory of the same kind under the same plan, which shares what was computed from the plan."""
        return type(self)(self.rules, table=self.table)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Ids of the sequences held."""
        return tuple(self._sequences)

    def add(self, sequence: int, pinned_tokens: int | None = None) -> None:
        """Admit an empty sequence.

        Raises:
            ValueError: the id is taken, or the plan pins lengths and none of at least 1 token is given.
        """
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence} is already held")
        self._sequences[sequence] = self._new_state(self._pinned_length(pinned_tokens))

    def remove(self, sequence: int) -> None:
        """Forget a sequence; its memory is free at once."""
        self.state(sequence).release()
        del self._sequences[sequence]

    def length(self, sequence: int, layer: int = 0) -> int:
        """Tokens of a sequence that a layer has seen."""
        return self.state(sequence).lengths[layer]

    def lengths(self, sequences: Sequence[int], layer: int) -> tuple[int, ...]:
        """Tokens of each sequence that a layer has seen; raises ValueError for an id that is not held."""
        held = self._sequences
        try:
            return tuple([held[sequence].lengths[layer] for sequence in sequences])
        except KeyError as missing:
            raise ValueError(f"sequence {missing.args[0]} is not held; add() it first") from None

    def select(self, sources: Sequence[int]) -> None:
        """Make sequence i a copy of what sequence `sources[i]` was, and forget all others (beam search)."""
        chosen = {source: self.state(source) for source in sources}
        for sequence, state in self._sequences.items():
            if sequence not in chosen:
                state.release()
        used: set[int] = set()
        self._sequences = {}
        for i, source in enumerate(sources):
            self._sequences[i] = chosen[source].clone() if source in used else chosen[source]
            used.add(source)

    def state(self, sequence: int) -> SequenceState:
        """What a sequence keeps; raises ValueError for an id that is not held."""
        if sequence not in self._sequences:
            raise ValueError(f"sequence {sequence} is not held; add() it first")
        return self._sequences[sequence]

    def _pinned_length(self, tokens: int | None) -> int | None:
        if not self.table.is_pinned:
            return None
        if tokens is None or tokens < 1:
            raise ValueError(
                "length mode 'pinned' needs pinned_tokens, the length fixed when the request is admitted, "
                f"of at least 1 token; got {tokens}"
            )
        return self.rules.pinned_length(tokens)

    @abstractmethod
    def stored_tokens(self, sequence: int, layer: int) -> list[int]:
        """Tokens really stored, per KV head."""

    @abstractmethod
    def _new_state(self, pinned_tokens: int | None) -> SequenceState: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for sequence in self.sequences:
            self.remove(sequence)


class TorchMemory(KVMemory):
    """Contiguous storage per sequence, layer and rule group; drops what no later query can need."""

    backend = "torch"

    def stored_tokens(self, sequence: int, layer: int) -> list[int]:
        """Tokens really stored, per KV head."""
        layout, stored = self.table.layers[layer], {}
        for group, state in zip(layout.groups, self.state(sequence).groups[layer], strict=True):
            stored.update(dict.fromkeys(layout.order[group.first : group.stop], state.live))
        return [stored[head] for head in range(len(layout.order))]

    def append(
        self, state: SequenceState, layer: int, i: int, group: HeadGroup, token: torch.Tensor, start: int
    ) -> None:
        """Store one token [2, Hg, D] of a sequence in group `i` of a layer, making room where the window grows."""
        held = state.groups[layer][i]
        if held.needs_slot(start):
            held.reserve(self.capacity(group, state.lengths[layer] + 1, state.pinned_tokens), token)
        held.append(token, start, self.table.sink_tokens)

    def capacity(self, group: HeadGroup, length: int, pinned_tokens: int | None) -> int:
        """Slots to allocate for a group whose sequence now has `length` tokens."""
        live = self.table.live_tokens(group.rule, length, pinned_tokens)
        return self.table.live_tokens(group.rule, length + reserve_ahead(live), pinned_tokens)

    def _new_state(self, pinned_tokens: int | None) -> SequenceState:
        layers = [[GroupState(self.bytes) for _ in layout.groups] for layout in self.table.layers]
        for group in (g for layer in layers for g in layer):
            group.window_from = self.table.sink_tokens
        return SequenceState(layers, pinned_tokens)
