"""A case as steps of a KV memory: rules with a layer for every set of buffers, its batches, and what is cached before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.kernels.batch import Batch
from moa.kernels.memory import KVMemory
from moa.spans import SpanRules

# Cached tokens are appended in chunks of so many.
FILL_TOKENS = 8192
# A chunk of one sequence in one layer: the layer, the chunk as a batch, its keys and values [T, HKV, D].
CachedChunk = tuple[int, Batch, torch.Tensor, torch.Tensor]


def layer_rules(case: Case, inputs: Sequence[Inputs]) -> SpanRules:
    """The pattern's rules with a layer for every set of buffers."""
    rules, layers = case.pattern.rules, [one.layer for one in inputs]
    return SpanRules(
        rules.alpha[layers], rules.beta_fixed[layers], rules.sink_tokens, rules.min_span_tokens, rules.length_mode
    )


def cached_chunks(kv: KVMemory, case: Case, inputs: Sequence[Inputs]) -> Iterator[CachedChunk]:
    """Admit every sequence of the case, and give what it has cached, chunk by chunk, in each layer."""
    for s, (i, row) in enumerate(sequences_of(case)):
        kv.add(s, pinned_tokens=case.tokens)
        cached = case.parts[i].cached
        for start in range(0, cached, FILL_TOKENS):
            stop = min(start + FILL_TOKENS, cached)
            batch = Batch.pack([(s, stop - start, start)])
            for layer, one in enumerate(inputs):
                data = one.parts[i]
                k, v = (x[row, :, start:stop].transpose(0, 1).contiguous() for x in (data.k, data.v))  # [T, HKV, D]
                yield layer, batch, k, v


def sequences_of(case: Case) -> list[tuple[int, int]]:
    """Part of every sequence of a step, and its row there, in the order of `Inputs.packed`."""
    return [(i, row) for i, part in enumerate(case.parts) for row in range(part.sequences)]


def step_batch(case: Case) -> Batch:
    """The step itself."""
    return Batch.pack([(s, case.parts[i].new, case.parts[i].cached) for s, (i, _) in enumerate(sequences_of(case))])
