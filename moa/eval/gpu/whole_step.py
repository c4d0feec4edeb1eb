"""Our attention as a model calls it: `attend`, with its bookkeeping on the host and the append of what survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.steps import cached_chunks, layer_rules
from moa.eval.gpu.subject import Built
from moa.eval.gpu.targets import WHOLE_STEP
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory
from moa.kernels.memory import KVMemory

MOST_CACHED_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class WholeStep:
    """`attend` over a memory whose layers are the sets of buffers, so that a turn is one step of a model.

    Every decode adds a token to the cache, as it would; a prefill begins an empty sequence.
    """

    backend: str
    name: str = WHOLE_STEP
    mask: Mask = "same"
    needs_s: float = 4.0
    is_ours: ClassVar[bool] = True

    def missing(self) -> str | None:
        """It comes with moa; what its backend needs it says itself."""
        return None

    def refuses(self, case: Case) -> str | None:
        """What cannot be repeated, and 8-bit keys and values."""
        if case.kind in ("chunk", "hybrid"):
            return "a chunk cannot be taken back, so it cannot be repeated"
        if case.kind == "decode" and case.batch * case.tokens > MOST_CACHED_TOKENS:
            return "filling so large a cache by attend() takes too long"
        return "8-bit keys and values are measured without the append" if case.kv != "bf16" else None

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Fill the memory with the cached tokens of every layer."""
        kv = new_memory(self.backend, layer_rules(case, inputs))
        if case.kind == "decode":
            fill(kv, case, inputs)
        step = _Step(kv, case)
        stored = kv.kv_bytes // len(inputs) if case.kind == "decode" else None
        return Built(
            tuple(step.call(layer, one) for layer, one in enumerate(inputs)),
            lambda out: [out.unflatten(0, (case.batch, -1))],  # type: ignore[no-untyped-call]
            stored,
        )


def fill(kv: KVMemory, case: Case, inputs: Sequence[Inputs]) -> None:
    """Append the cached tokens of every sequence as a model would, attending to them."""
    for layer, batch, k, v in cached_chunks(kv, case, inputs):
        q = k.new_zeros(len(k), case.heads.heads, case.heads.head_dim)  # [T, HQ, D]
        attend(q, k, v, kv, layer, batch)


class _Step:
    """The steps of a case: a batch for all layers of a step, made when its first layer is called."""

    def __init__(self, kv: KVMemory, case: Case) -> None:
        self.kv, self.part, self.tokens = kv, case.parts[0], case.tokens
        self.batch = Batch(())

    def call(self, layer: int, one: Inputs) -> Call:
        """The attention of one layer; layers are called in turn."""
        q, k, v = one.packed()

        def run() -> torch.Tensor:
            if layer == 0:
                self._next()
            return attend(q, k, v, self.kv, layer, self.batch)

        return run

    def _next(self) -> None:
        if self.part.cached == 0:
            for s in range(self.part.sequences):
                if s in self.kv.sequences:
                    self.kv.remove(s)
                self.kv.add(s, pinned_tokens=self.tokens)
        position = self.kv.length(0)
        self.batch = Batch.pack([(s, self.part.new, position) for s in range(self.part.sequences)])
