"""Pages of our Triton kernels, filled with a case's cached tokens, and its step made ready in every layer.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.steps import cached_chunks, layer_rules, step_batch
from moa.eval.gpu.timing import Call
from moa.kernels.paged import backend
from moa.kernels.paged.backend import Ready
from moa.kernels.paged.lists import Launches
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.paged.pool import KVDtype
from moa.kernels.scores import Scores

KV_DTYPES: dict[str, KVDtype | None] = {"bf16": None, "fp8": "fp8", "int8": "int8"}


def ready_layers(case: Case, inputs: Sequence[Inputs], launches: Launches = "auto") -> tuple[PagedMemory, list[Ready]]:
    """A memory with the cached tokens of every layer, and the case's step made ready in each."""
    kv = PagedMemory(layer_rules(case, inputs), kv_dtype=KV_DTYPES[case.kv], launches=launches)
    fill_pages(kv, case, inputs)
    batch, scores = step_batch(case), Scores(case.heads.head_dim**-0.5)
    return kv, [
        backend.prepare(*one.packed(), kv, layer, batch, scores)  # the step's pages are taken by the first
        for layer, one in enumerate(inputs)
    ]


def fill_pages(kv: PagedMemory, case: Case, inputs: Sequence[Inputs]) -> None:
    """Append the cached tokens of every sequence without attending to them."""
    scores, heads = Scores(1.0), case.heads
    for layer, batch, k, v in cached_chunks(kv, case, inputs):
        q = k.new_empty(1, heads.heads, heads.head_dim).expand(len(k), -1, -1)  # [T, HQ, D], not looked at
        backend.append(backend.prepare(q, k, v, kv, layer, batch, scores), kv)


def run_layers(ready: Sequence[Ready]) -> tuple[Call, ...]:
    """What launches the attention of each layer."""

    def call(one: Ready) -> Call:
        def run() -> torch.Tensor:
            backend.run(one)
            return one.call.out

        return run

    return tuple(map(call, ready))


def unpack_parts(case: Case) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Outputs [T, HQ, D] as [S, C, HQ, D] per part."""
    sizes = [part.sequences * part.new for part in case.parts]

    def unpack(out: torch.Tensor) -> list[torch.Tensor]:
        pieces = torch.split(out, sizes)
        return [
            piece.reshape(part.sequences, part.new, *out.shape[1:])
            for piece, part in zip(pieces, case.parts, strict=True)
        ]

    return unpack
