"""Measures steps of a model on its device, for the cost model: seconds, before the first request."""

from __future__ import annotations

import time

import numpy as np
import torch

from moa.errors import ResourceError
from moa.kernels.batch import Batch
from moa.runner.cost_model import CostModel, Float64Array, step_work
from moa.runner.host import MemoryHost
from moa.runner.packed import PackedModel
from moa.runner.policies import Job

# (tokens of a prompt's chunk, decodes beside it): ends and middles of what steps are made of.
STEPS = ((16, 0), (64, 0), (256, 0), (512, 0), (0, 1), (0, 8), (0, 32), (64, 8), (256, 32))
CONTEXTS_TOKENS = (64, 512)
REPEATS = 3  # the least time of these counts: the first one also warms up


def measure(packed: PackedModel, host: MemoryHost, context_tokens: int | None, max_running: int) -> CostModel:
    """The cost model of a model on its device, from steps of arbitrary tokens; memory is empty before and after.

    Raises:
        ResourceError: there is no room for a single step.
    """
    work: list[Float64Array] = []
    seconds: list[float] = []
    for context in CONTEXTS_TOKENS:
        steps = [
            (chunk, decodes)
            for chunk, decodes in STEPS
            if decodes <= max_running
            and (context_tokens is None or context + max(chunk, 1) <= context_tokens)
            and _fits(host, context, chunk, decodes)
        ]
        if steps:
            _measure_at(packed, host, context, steps, work, seconds)
    if not seconds:
        raise ResourceError("there is too little KV memory to measure steps in; give kv_bytes more, or a token budget")
    return CostModel.fit(np.stack(work), np.array(seconds))


def _fits(host: MemoryHost, context: int, chunk: int, decodes: int) -> bool:
    footprint, pinned = host.account.footprint, context + chunk + 1
    wanted = [footprint.most(context + more, pinned) for more in (0, chunk, 1)]
    return wanted[0] + wanted[1] + decodes * wanted[2] <= host.account.free_slots


def _measure_at(
    packed: PackedModel,
    host: MemoryHost,
    context: int,
    steps: list[tuple[int, int]],
    work: list[Float64Array],
    seconds: list[float],
) -> None:
    """Steps whose sequences all have `context` tokens: copies of one that was computed once."""
    memory, pinned = host.memory, context + max(chunk for chunk, _ in steps) + 1
    base = next(host.ids)
    memory.add(base, pinned)
    packed.forward([1] * context, range(context), Batch.pack([(base, context, 0)]), memory, [0])
    for chunk, decodes in steps:
        counts = [chunk] * bool(chunk) + [1] * decodes
        jobs = [_job(context, chunk, pinned)] * bool(chunk) + [_job(context, 1, pinned)] * decodes
        work.append(step_work(list(zip(jobs, counts, strict=True)), host.account.footprint))
        seconds.append(min(_time(packed, host, base, context, counts) for _ in range(REPEATS)))
    memory.remove(base)


def _time(packed: PackedModel, host: MemoryHost, base: int, context: int, counts: list[int]) -> float:
    """Seconds of one step in which copies of `base` go on by `counts` tokens."""
    ids = [next(host.ids) for _ in counts]
    for sequence in ids:
        host.memory.copy(base, sequence)
    batch = Batch.pack([(sequence, count, context) for sequence, count in zip(ids, counts, strict=True)])
    positions = [context + i for count in counts for i in range(count)]
    lasts = (np.cumsum(counts) - 1).tolist()
    started = time.perf_counter()
    logits = packed.forward([1] * len(positions), positions, batch, host.memory, lasts)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    took = time.perf_counter() - started
    for sequence in ids:
        host.memory.remove(sequence)
    return took


def _job(context: int, count: int, pinned: int) -> Job:
    return Job(
        order=0,
        arrived_s=0.0,
        known_tokens=context + count,
        most_cached_tokens=context + count,
        pinned_tokens=pinned,
        computed_tokens=context,
        is_decoding=count == 1,
    )
