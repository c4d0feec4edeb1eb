"""What profiling costs beside a plain training step: peak memory and time at growing lengths, in fresh processes."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moa import process_memory
from moa.profile import attention, collect, footprint
from moa.profile.collect import InfluenceSettings
from moa.profile.data import TextSample
from moa.profile.sweep import SpanGrid

SPANS = (64, 128)
ANSWER_TOKENS = footprint.ANSWER_TOKENS
STEP, INPUTS, PROFILE, CHECKPOINTED = "training step", "input gradients", "profile", "profile, checkpointed"
KINDS = (STEP, INPUTS, PROFILE, CHECKPOINTED)
# glibc gives blocks of 32 MiB and more back to the system as soon as they are freed, which is nearly all memory of a real
# model. While memory is measured, the same from a size on that has this small model behave like a large one.
M_MMAP_THRESHOLD, SMALL_BLOCK, TILE_BLOCK, USUAL_BLOCK = -3, 1 << 16, 3 << 19, 1 << 25
# Beyond this, one repeat of the two that the ratio needs.
REPEATED_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class CostRow:
    """One kind of pass at one length: CPU seconds (median), peak bytes beside the weights, and the bytes predicted."""

    n_tokens: int
    kind: str
    seconds: float
    peak_bytes: int
    predicted_bytes: int | None


def bench_model(device: str = "cpu") -> PreTrainedModel:
    """A Llama-shaped random model: 2 layers, 2 query heads on 1 KV head of 64, float32."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 2,
        "head_dim": 64,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1 << 20}
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def bench_costs(
    lengths: Sequence[int], repeats: int, progress: Callable[[str, int, int], None] = lambda stage, done, of: None
) -> list[CostRow]:
    """Measure every length in a process of its own; weights are shared by nothing.

    Raises:
        ResourceError: not on Linux, whose /proc tells a process's peak memory.
    """
    rows: list[CostRow] = []
    # one task per child: what a length leaves in the allocator must not count at the next
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for done, n_tokens in enumerate(lengths, 1):
            rows += pool.submit(measure, n_tokens, repeats).result()
            progress("profile cost", done, len(lengths))
    return rows


def measure(n_tokens: int, repeats: int) -> list[CostRow]:
    """The kinds of passes at one length, alternating, on one thread."""
    torch.set_num_threads(1)
    model, long = bench_model(), n_tokens > REPEATED_TOKENS
    kinds = (STEP, PROFILE) if long else KINDS
    _give_back_from(TILE_BLOCK if long else SMALL_BLOCK)
    for kind in kinds:  # loads libraries, so that they count as there before
        _run(model, _sample(256), kind)
    base = process_memory.held_bytes()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks = {}
    for kind in kinds:
        process_memory.give_back()
        process_memory.reset_peak()
        seconds[kind].append(_timed(model, n_tokens, kind))
        peaks[kind] = process_memory.peak_bytes() - base
    if not long:
        _give_back_from(USUAL_BLOCK)
        seconds = {kind: [] for kind in kinds}
        for kind in kinds * repeats:
            seconds[kind].append(_timed(model, n_tokens, kind))
    return [CostRow(n_tokens, k, median(seconds[k]), peaks[k], _predicted(n_tokens, k)) for k in kinds]


def _timed(model: PreTrainedModel, n_tokens: int, kind: str) -> float:
    started = time.process_time()  # not wall time: the machine may be busy
    _run(model, _sample(n_tokens), kind)
    return time.process_time() - started


def _give_back_from(block_bytes: int) -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, block_bytes)


def _sample(n_tokens: int) -> TextSample:
    generator = torch.Generator().manual_seed(n_tokens)
    ids = torch.randint(3, 1024, (n_tokens,), generator=generator).tolist()
    positions = tuple(range(n_tokens - ANSWER_TOKENS, n_tokens))
    return TextSample(tuple(ids), positions, tuple(ids[p] for p in positions))


def _run(model: PreTrainedModel, sample: TextSample, kind: str) -> None:
    n = len(sample.token_ids)
    settings, grid = InfluenceSettings(), SpanGrid.for_length(n, *SPANS)
    if kind in (PROFILE, CHECKPOINTED):
        reference = collect.uniform(settings.reference_density, *SPANS)
        probe = attention.Probe(grid, settings.estimator, settings.attenuations[0], reference)
        with collect.profiled(model, checkpointing=kind == CHECKPOINTED):
            collect.backward(model, sample, probe, settings)
        return
    model.requires_grad_(kind == STEP)
    before = [p - 1 for p in sample.answer_positions]
    embedded = model.get_input_embeddings()(torch.tensor([sample.token_ids]))
    embedded = embedded if kind == STEP else embedded.requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=before).logits[0]
    torch.autograd.backward(F.cross_entropy(logits, torch.tensor(sample.answer_ids)))
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)


def _predicted(n_tokens: int, kind: str) -> int | None:
    if kind not in (PROFILE, CHECKPOINTED):
        return None
    return footprint.profile_bytes(bench_model("meta"), n_tokens, SPANS, kind == CHECKPOINTED)


def slope(rows: Sequence[CostRow], kind: str) -> float:
    """Exponent of peak memory in the length: of the line through log(bytes) over log(tokens)."""
    mine = [row for row in rows if row.kind == kind]
    x, y = np.log([row.n_tokens for row in mine]), np.log([row.peak_bytes for row in mine])
    return float(np.polyfit(x, y, 1)[0]) if len(mine) > 1 else math.nan


def ratios(rows: Sequence[CostRow]) -> Iterator[tuple[int, float, float]]:
    """Length, memory and time of profiling over those of a training step."""
    at = {(row.n_tokens, row.kind): row for row in rows}
    for n_tokens in sorted({row.n_tokens for row in rows}):
        step, profile = at[n_tokens, STEP], at[n_tokens, PROFILE]
        yield n_tokens, profile.peak_bytes / step.peak_bytes, profile.seconds / step.seconds
