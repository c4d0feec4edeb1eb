"""Our attention as a model calls it: `attend`, with its bookkeeping on the host and the append of what survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.subject import Built
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory
from moa.kernels.memory import KVMemory
from moa.spans import SpanRules

# Cached tokens are appended in chunks of so many.
FILL_TOKENS = 8192
MOST_CACHED_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class WholeStep:
    """`attend` over a memory whose layers are the sets of buffers, so that a turn is one step of a model.

    Every decode adds a token to the cache, as it would; a prefill begins an empty sequence.
    """

    backend: str
    name: str = "moa, whole step"
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


def layer_rules(case: Case, inputs: Sequence[Inputs]) -> SpanRules:
    """The pattern's rules with a layer for every set of buffers."""
    rules, layers = case.pattern.rules, [one.layer for one in inputs]
    return SpanRules(
        rules.alpha[layers], rules.beta_fixed[layers], rules.sink_tokens, rules.min_span_tokens, rules.length_mode
    )


def fill(kv: KVMemory, case: Case, inputs: Sequence[Inputs]) -> Batch:
    """Append the cached tokens of every sequence, a chunk after the other; returns the batch of the case's step."""
    for s, (i, row) in enumerate(sequences_of(case)):
        kv.add(s, pinned_tokens=case.tokens)
        cached = case.parts[i].cached
        for start in range(0, cached, FILL_TOKENS):
            stop = min(start + FILL_TOKENS, cached)
            batch = Batch.pack([(s, stop - start, start)])
            for layer, one in enumerate(inputs):
                data = one.parts[i]
                k, v = (x[row, :, start:stop].transpose(0, 1).contiguous() for x in (data.k, data.v))  # [T, HKV, D]
                q = k.new_zeros(stop - start, case.heads.heads, case.heads.head_dim)  # [T, HQ, D]
                attend(q, k, v, kv, layer, batch)
    return step_batch(case)


def sequences_of(case: Case) -> list[tuple[int, int]]:
    """Part of every sequence of a step, and its row there, in the order of `Inputs.packed`."""
    return [(i, row) for i, part in enumerate(case.parts) for row in range(part.sequences)]


def step_batch(case: Case) -> Batch:
    """The step itself."""
    return Batch.pack([(s, case.parts[i].new, case.parts[i].cached) for s, (i, _) in enumerate(sequences_of(case))])


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
