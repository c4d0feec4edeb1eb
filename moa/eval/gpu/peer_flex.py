"""Compiled flex_attention with exactly the plan's mask, its blocks computed from the spans without an N x N mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moa.eval.gpu.cases import Case, Part
from moa.eval.gpu.inputs import Inputs, PartData
from moa.eval.gpu.patterns import Pattern
from moa.eval.gpu.peer_sdpa import pack_queries, unpack
from moa.eval.gpu.subject import Built
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask

BLOCK = 128
# A compiled function per shape; torch gives up at 8 otherwise and goes on without compiling.
MOST_SHAPES = 1000


@dataclass(frozen=True, slots=True)
class Flex:
    """flex_attention under `torch.compile`; eager, which is only right and not fast, in tests."""

    device: torch.device
    compiled: bool = True
    name: str = "flex_attention"
    mask: Mask = "same"
    needs_s: float = 25.0
    is_ours: ClassVar[bool] = False

    def missing(self) -> str | None:
        """It comes with torch, and compiles through Triton."""
        return "triton is not installed" if self.compiled and find_spec("triton") is None else None

    def refuses(self, case: Case) -> str | None:
        """Mixed steps and 8-bit keys and values."""
        if case.kind == "hybrid":
            return "one length per call"
        return "no 8-bit keys and values" if case.kv != "bf16" else None

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Compile for the shapes, and make one block mask per layer of the pattern."""
        attend: Callable[..., torch.Tensor] = _compiled() if self.compiled else flex_attention  # type: ignore[assignment]
        masks = {layer: block_mask(case, layer, self.device) for layer in {one.layer for one in inputs}}
        calls = tuple(self._call(attend, case, one.parts[0], masks[one.layer]) for one in inputs)
        heads = case.heads.heads
        return Built(calls, lambda out: [unpack(out, case.kind, heads)])

    def _call(self, attend: Callable[..., torch.Tensor], case: Case, data: PartData, blocks: BlockMask) -> Call:
        q, gqa = pack_queries(case, data), case.kind != "decode" and case.heads.group > 1
        return lambda: attend(q, data.k, data.v, block_mask=blocks, enable_gqa=gqa)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = 2 * MOST_SHAPES
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def block_mask(case: Case, layer: int, device: torch.device) -> BlockMask:
    """The blocks of keys that queries of each block see, in part or in full, from the window starts at block edges.

    Window starts never move back, so a block's first query sees furthest. Equal to `create_block_mask` of the same mask.
    """
    part, group = case.parts[0], case.heads.group
    rows = 1 if case.kind == "decode" else part.new
    starts = window_starts(case.pattern, layer, part)  # [HKV, C]
    first, last = block_edges(rows)
    partly, fully = _blocks(starts, part, first, last, case.pattern.rules.sink_tokens)  # [HKV, QB, KB]
    if case.kind == "decode":
        group = 1  # the queries of a KV head are rows here, and all of them at one position
    partly, fully = (x.repeat(group, 0) for x in (partly, fully))  # [HQ or HKV, QB, KB]
    keep = _keep(torch.from_numpy(starts).to(device, torch.int32), part, case, group)
    return BlockMask.from_kv_blocks(
        *_listed(partly, device),
        *_listed(fully, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=keep,
        seq_lengths=(case.heads.group if case.kind == "decode" else rows, part.cached + part.new),
    )


def window_starts(pattern: Pattern, layer: int, part: Part) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """First key of the window of each new token: int64 [HKV, C]."""
    positions = np.arange(part.cached, part.cached + part.new, dtype=np.int64)
    found = pattern.rules.window_start(positions, part.cached + part.new)[layer]
    return np.ascontiguousarray(found)


def block_edges(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last index of each block of `rows`."""
    first = np.arange(0, rows, BLOCK)
    return first, np.minimum(first + BLOCK - 1, rows - 1)


def _blocks(
    starts: np.ndarray, part: Part, first: np.ndarray, last: np.ndarray, sink_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    k_low, k_high = block_edges(part.cached + part.new)
    p_low, p_high = (part.cached + edge[:, None] for edge in (first, last))  # [QB, 1]
    early, late = starts[:, first, None], starts[:, last, None]  # [HKV, QB, 1]
    touched = (k_low <= p_high) & ((k_high >= early) | (k_low < sink_tokens))
    fully = (k_high <= p_low) & ((late <= np.maximum(k_low, sink_tokens)) | (k_high < sink_tokens))
    return touched & ~fully, fully


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks and which, int32 [1, H, QB] and [1, H, QB, KB]: those seen first, in order."""
    seen = torch.from_numpy(np.ascontiguousarray(blocks)).to(device)
    order = torch.argsort(seen.to(torch.int8), dim=-1, descending=True, stable=True)
    return seen.sum(-1).to(torch.int32)[None], order.to(torch.int32)[None]


def _keep(
    starts: torch.Tensor, part: Part, case: Case, group: int
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    sinks, offset = case.pattern.rules.sink_tokens, part.cached
    if case.kind == "decode":
        last = starts[:, 0].contiguous()  # [HKV]
        return lambda b, h, q, j: (j < sinks) | (j >= last[h])
    return lambda b, h, q, j: (j <= q + offset) & ((j < sinks) | (j >= starts[h // group, q]))
