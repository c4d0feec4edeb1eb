"""KV memory per sequence and layer: holds exactly the tokens that spans keep, and frees the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch

from moa.kernels.layout import HeadGroup, LayerLayout, SpanTable
from moa.kernels.storage import ByteCount
from moa.kernels.store import Store
from moa.spans import SpanRules


class LayerState:
    """What one sequence keeps of a layer: one store of all heads while nothing has been dropped, then one per rule group."""

    def __init__(self, groups: Sequence[HeadGroup], stores: list[Store]) -> None:
        self.groups, self.stores = tuple(groups), stores
        self.sizes = [group.stop - group.first for group in groups]
        self.rules = [group.rule for group in groups]

    @property
    def is_whole(self) -> bool:
        """Whether all heads lie in one store."""
        return len(self.stores) == 1

    def parts(self) -> Iterator[tuple[HeadGroup, Store]]:
        """Heads that lie together, with a rule that holds for all of them, and their store."""
        if self.is_whole:
            yield HeadGroup(self.groups[0].rule, 0, self.groups[-1].stop), self.stores[0]
        else:
            yield from zip(self.groups, self.stores, strict=True)

    def split(self) -> None:
        """Give every rule group a store of its own."""
        if self.is_whole and len(self.groups) > 1:
            whole = self.stores[0]
            self.stores = [whole.heads(slice(group.first, group.stop)) for group in self.groups]
            whole.release()

    def clone(self) -> LayerState:
        """An independent copy."""
        return LayerState(self.groups, [store.clone() for store in self.stores])

    def release(self) -> None:
        """Give all storage back."""
        for store in self.stores:
            store.release()


class SequenceState:
    """What one sequence keeps: tokens seen per layer, and a state per layer."""

    def __init__(self, layers: Sequence[LayerState], n_layers: int, pinned_tokens: int | None) -> None:
        self.layers = list(layers)
        self.lengths = [0] * n_layers
        self.pinned_tokens = pinned_tokens

    def clone(self) -> SequenceState:
        """An independent copy."""
        other = SequenceState([layer.clone() for layer in self.layers], len(self.lengths), self.pinned_tokens)
        other.lengths = list(self.lengths)
        return other

    def release(self) -> None:
        """Give all storage back."""
        for layer in self.layers:
            layer.release()


class KVMemory(ABC):
    """Keys and values of any number of sequences under one plan; each backend has its own kind.

    Args:
        rules: spans of all layers and KV heads.
        native_windows: the model's own sliding window per layer in tokens, None where a layer has none.
    """

    backend: ClassVar[str]
    path: str = ""  # how the last slice was attended, of a backend that has several ways

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

    def copy(self, source: int, sequence: int) -> None:
        """Admit `sequence` as an independent copy of what `source` holds now.

        Raises:
            ValueError: `sequence` is taken, or `source` is not held.
            ResourceError: a pool of fixed size has no room for the copy; nothing has changed.
        """
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence} is already held")
        self._sequences[sequence] = self.state(source).clone()

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

    def __init__(
        self, rules: SpanRules, native_windows: Sequence[int | None] = (), table: SpanTable | None = None
    ) -> None:
        super().__init__(rules, native_windows, table)
        # How the last slice was attended: "dense" while nothing has been dropped, in one call for all heads, or "spans"
        # in one call per rule group; by "views" for one token, for more by "tiles", "flash" or "masks" (see banded.py).
        self.path = ""

    def stored_tokens(self, sequence: int, layer: int) -> list[int]:
        """Tokens really stored, per KV head."""
        order, stored = self.table.layers[layer].order, {}
        for group, store in self.state(sequence).layers[layer].parts():
            stored.update(dict.fromkeys(order[group.first : group.stop], len(store)))
        return [stored[head] for head in range(len(order))]

    def _new_state(self, pinned_tokens: int | None) -> SequenceState:
        layers = [self._new_layer(layout) for layout in self.table.layers]
        return SequenceState(layers, len(layers), pinned_tokens)

    def _new_layer(self, layout: LayerLayout) -> LayerState:
        native = self.table.native_window(layout.groups[0].rule)
        return LayerState(layout.groups, [Store(self.bytes, self.table.sink_tokens, keeps_order=native is not None)])
