"""Counts what the Triton backend would compile while lengths, positions, layers and page tables change: JSON on stdout.

Run without TRITON_INTERPRET. Kernels are asked for the keys of their compilations and are not launched, so no GPU is needed.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from moa.kernels.batch import Batch
from moa.kernels.paged import launch
from moa.kernels.paged.backend import attend
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.scores import Scores
from moa.spans import SpanRules

LAYERS, HKV, GROUP, SIZE = 3, 2, 2, 64
keys: dict[str, set[str]] = defaultdict(set)


def record(self: triton.JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
    """What JITFunction.run looks a compiled kernel up by."""
    bind = create_function_from_signature(self.signature, self.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, chosen = bind(*args, **options)
    keys[self.__name__].add(f"{specialization} {chosen}")


def step(kv: PagedMemory, parts: list[tuple[int, int]]) -> None:
    """One step of (sequence, tokens) in all layers."""
    batch = Batch.pack([(i, n, kv.length(i)) for i, n in parts])
    for layer in range(LAYERS):
        q = torch.zeros(batch.end, HKV * GROUP, SIZE, dtype=torch.bfloat16)
        k, v = (torch.zeros(batch.end, HKV, SIZE, dtype=torch.bfloat16) for _ in range(2))
        attend(q, k, v, kv, layer, batch, Scores(0.125))


def main() -> None:
    triton.JITFunction.run = record
    launch.INTERPRETED = True  # takes CPU tensors
    alpha, beta = torch.tensor([[0, 40]] * LAYERS).numpy(), torch.tensor([[1 << 15, 0]] * LAYERS).numpy()
    for sink, launches in product((1, 16, 64), ("serial", "spread", "tickets")):
        kv = PagedMemory(SpanRules(alpha, beta, sink, 128), kv_dtype="int8", launches=launches)
        for i in range(2):
            kv.add(i)
        for n in (1, 2, 16, 17, 64, 65, 100, 1000, 4096):
            step(kv, [(0, n), (1, 1)])
            step(kv, [(0, 1), (1, 2)])
    json.dump({name: len(found) for name, found in keys.items()}, sys.stdout)


if __name__ == "__main__":
    main()
