"""A transformers cache whose layers hold KV memory per batch row; rows may be padded on either side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from moa.errors import ModelError
from moa.kernels.batch import Batch
from moa.kernels.memory import KVMemory
from moa.kernels.storage import ByteCount

# Cache.update returns the keys untouched to the attention function: this attribute carries the layer there.
LAYER_TAG = "_moa_layer"


class Switch:
    """Whether an attachment is on; its caches refuse to run under other attention, which would ignore them."""

    def __init__(self) -> None:
        self.on = True

    def __deepcopy__(self, memo: object) -> Switch:
        """Itself: a copied cache goes off with the others."""
        return self


@dataclass(slots=True)
class Usage:
    """What a cache has come to; outlives the cache, so that it can be read afterwards.

    `slots` are those of a row, padding included; `path` is how the backend attended last.
    """

    bytes: ByteCount
    rows: int = 0
    slots: int = 0
    path: str = ""


class Step(NamedTuple):
    """One forward step of a batch: which packed token belongs to which row, and where the real tokens lie.

    `real` holds their slots in the flattened step, int64 [T']; None if no slot is padding.
    """

    batch: Batch
    real: torch.Tensor | None


class Rows:
    """The rows of a batch as sequences of a KV memory; shared by all layers of a cache.

    Each row is its own sequence: padding, wherever it lies, takes no position.

    Args:
        memory: empty KV memory.
        pinned_slots: for pinned plans, slots per row when all is generated, padding included; None pins a row to the
            tokens of its first step.
    """

    def __init__(self, memory: KVMemory, pinned_slots: int | None = None) -> None:
        self.memory = memory
        self.pinned_slots = pinned_slots
        self.count = 0
        self.usage = Usage(memory.bytes)
        self._admitted: set[int] = set()
        self._key: tuple[int, int] | None = None
        self._layer = -1  # whose step it was
        self._mask: torch.Tensor | None = None
        self._step = Step(Batch(()), None)

    def step(self, layer: int, rows: int, tokens: int, seen: int, mask: torch.Tensor | None) -> Step:
        """The step of `tokens` slots per row after `seen`, padding `mask` bool [B, T] or None.

        Computed in the first layer of a step and kept for the others.

        Raises:
            ModelError: the number of rows changed, the mask has another shape, or the layers before have seen another
                text than this one.
        """
        if layer > self._layer and self._key is not None and self._key[0] != seen:
            raise ModelError(
                f"layer {layer} has seen {seen} tokens per row, the layers before it {self._key[0]}: an earlier call "
                "was interrupted or refused between them; start again with a new cache"
            )
        self._layer = layer
        if self._key != (seen, tokens) or self._mask is not mask or self.count != rows:
            if self.count not in (0, rows):
                raise ModelError(f"the cache holds {self.count} rows, this step has {rows}; use a new cache")
            if mask is not None and mask.shape != (rows, tokens):
                raise ModelError(f"wanted a padding mask of shape {(rows, tokens)}, got {tuple(mask.shape)}")
            self.count, self._key, self._mask = rows, (seen, tokens), mask
            self.usage.rows, self.usage.slots = rows, seen + tokens
            self._step = self._make_step(layer, rows, tokens, seen, mask)
        return self._step

    def _make_step(self, layer: int, rows: int, tokens: int, seen: int, mask: torch.Tensor | None) -> Step:
        counts, first, real = [tokens] * rows, [0] * rows, None
        if mask is not None:
            counts, first = mask.sum(1).tolist(), mask.int().argmax(1).tolist()  # [B]
            real = mask.flatten().nonzero().flatten()  # [T']
        parts = []
        for row, count in enumerate(counts):
            if count and row not in self._admitted:
                self._admit(row, count if self.pinned_slots is None else max(1, self.pinned_slots - seen - first[row]))
            if count:
                parts.append((row, count, self.memory.length(row, layer)))
        return Step(Batch.pack(parts), real)

    def _admit(self, row: int, pinned_tokens: int) -> None:
        self.memory.add(row, pinned_tokens)
        self._admitted.add(row)

    def select(self, sources: Sequence[int]) -> None:
        """Make row i what row `sources[i]` was."""
        for row in set(sources) - self._admitted:  # a row that is all padding
            self._admit(row, 1)
        self.memory.select(sources)
        self.count, self._admitted, self._key = len(sources), set(range(len(sources))), None
        self.usage.rows = self.count

    def reset(self) -> None:
        """Forget all rows."""
        for row in self._admitted:
            self.memory.remove(row)
        self.count, self._key, self._mask = 0, None, None
        self._admitted.clear()


class MoaLayer(CacheLayerMixin):
    """One layer of a `MoaCache`: counts slots, and hands itself to the attention function, which stores what survives."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, index: int, rows: Rows, switch: Switch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers has no types here
        self.index, self.rows, self.switch = index, rows, switch
        self.seen = self.taken = 0

    @property
    def batch_size(self) -> int:
        """Rows held; raises AttributeError before the first step, as transformers' own layers do."""
        if not self.rows.count:
            raise AttributeError("batch_size")
        return self.rows.count

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate ahead."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count this step's slots and return its keys and values [B, HKV, T, D] alone, the keys tagged with this layer."""
        if torch.compiler.is_compiling():  # a graph would guard on every count, and drop the tag
            outside: tuple[torch.Tensor, torch.Tensor] = torch.compiler.disable(self._tag)(key_states, value_states)  # type: ignore[no-untyped-call]  # torch has no types here
            return outside
        return self._tag(key_states, value_states)

    def _tag(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.switch.on:
            raise ModelError(
                "this cache belongs to a plan that is not applied now; dense attention needs a cache of its own"
            )
        if self.taken != self.seen:
            raise ModelError(
                f"attention of layer {self.index} did not store the previous step's keys: "
                "this model changes keys between its cache and its attention, so it cannot run under a plan"
            )
        self.is_initialized = True
        self.seen += key_states.shape[-2]
        tagged = key_states.view_as(key_states)
        setattr(tagged, LAYER_TAG, self)
        return tagged, value_states

    def take(self, slots: int) -> int:
        """Mark this step's keys as stored, once; gives the slots seen before it."""
        if self.taken == self.seen:
            raise ModelError(
                f"attention of layer {self.index} runs twice in a step (differential attention?), "
                "so this model cannot run under a plan"
            )
        self.taken = self.seen
        return self.seen - slots

    def get_seq_length(self) -> int:
        """Slots seen per row, padding included: what positions and masks are made from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(all slots after this step, offset 0)."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget the slots seen."""
        self.seen, self.taken, self.is_initialized = 0, 0, False

    def offload(self) -> NoReturn:
        """Not implemented."""
        raise ModelError("offloading a moa cache is not implemented")

    prefetch = offload


class MoaCache(Cache):
    """The cache of one batch under a plan; made by `Attachment.new_cache()`, used once like any transformers cache."""

    def __init__(self, memory: KVMemory, switch: Switch, pinned_slots: int | None = None) -> None:
        self.rows = Rows(memory, pinned_slots)
        super().__init__(layers=[MoaLayer(i, self.rows, switch) for i in range(len(memory.table.layers))])

    @property
    def memory(self) -> KVMemory:
        """Where keys and values lie."""
        return self.rows.memory

    @property
    def usage(self) -> Usage:
        """The live count of rows, slots and allocated bytes."""
        return self.rows.usage

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values really allocated, all rows and layers together."""
        return self.memory.kv_bytes

    def reset(self) -> None:
        """Forget everything; memory is free at once."""
        super().reset()  # type: ignore[no-untyped-call]  # transformers has no types here
        self.rows.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row `beam_idx[i]` was; `beam_idx` int64 [B]."""
        self.rows.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.rows.select([row for row in range(self.rows.count) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, int64 [B'] or bool [B]."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.rows.select(indices.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a span has dropped what a shorter text would need.

        Raises:
            ModelError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise ModelError(
                "a moa cache cannot be cropped: tokens that its spans dropped are gone; "
                "assisted decoding and prompt lookup need the dense model (`with model.moa.disabled():`)"
            )

    def activate_past_recording(self) -> NoReturn:
        """Refused, as `crop` is."""
        raise ModelError("a moa cache keeps no past to go back to; assisted decoding needs the dense model")
