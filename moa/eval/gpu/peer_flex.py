"""Compiled flex_attention with exactly the plan's mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moa.eval.flex_mask import chunk_mask, token_mask
from moa.eval.gpu.cases import Case
from moa.eval.gpu.check import window_starts
from moa.eval.gpu.inputs import Inputs, PartData
from moa.eval.gpu.peer_sdpa import pack_queries, unpack
from moa.eval.gpu.subject import Built
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask

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
    """The blocks of keys that queries of each block see, in part or in full, under a layer's rules."""
    part, sinks = case.parts[0], case.pattern.rules.sink_tokens
    starts = window_starts(case.pattern, layer, part, "same", range(part.new))  # [HKV, C]
    if case.kind == "decode":
        return token_mask(starts[:, 0], part.cached + 1, sinks, case.heads.group, device)
    return chunk_mask(starts, part.cached, sinks, case.heads.group, device)
