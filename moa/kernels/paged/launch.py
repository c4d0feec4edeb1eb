"""Launches the kernels of this folder on torch tensors.

Importing this module imports triton.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

from moa.kernels.paged.append_kernel import append_kernel
from moa.kernels.paged.attend_kernel import attend_kernel
from moa.kernels.paged.merge_kernel import merge_kernel
from moa.kernels.paged.quantise import most_code
from moa.kernels.paged.tiles import Tile, padded_head_dim
from moa.kernels.scores import Scores

LOG2E = math.log2(math.e)
APPEND_TOKENS = 16  # of a block that one program appends
# Whether kernels run in Triton's interpreter: decided by TRITON_INTERPRET when they are imported.
INTERPRETED = not isinstance(attend_kernel, triton.JITFunction)


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Pools:
    """Where pages lie.

    Args:
        keys, values: pages in the model's dtype, [pages, 64, D].
        codes: quantised keys and values [pages, 64, D] and their scales, float32 [pages, 64]; None if none are.
    """

    keys: torch.Tensor
    values: torch.Tensor
    codes: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Heads:
    """What kernels know of a plan, on their device.

    Args:
        rules: alpha, beta in 1/65536 and native window, int64 [R, 3].
        rule_of_head: int32 [L, HKV].
        sink_tokens: first tokens that every head keeps.
        min_span_tokens: least span.
    """

    rules: torch.Tensor
    rule_of_head: torch.Tensor
    sink_tokens: int
    min_span_tokens: int


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Call:
    """One layer's attention in a step: what all its launches share.

    Args:
        q: queries [T, HQ, D]; the last dimension of all inputs is contiguous.
        k, v: this step's keys and values [T, HKV, D].
        out: [T, HQ, D], to be written.
        lse: natural log-sum-exp over the keys, float32 [T, HQ], to be written.
        pools: pages.
        table: page of every (slot, head, 64 tokens), int32 [slots, L * HKV, width].
        slices: offset, tokens, position and slot, int32 [S, 4].
        pinned: pinned length, 0 for running ones, int64 [S].
        heads: rules.
        layer: index of the layer.
        scores: how keys are scored, with sinks [HQ], if any.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    pools: Pools
    table: torch.Tensor
    slices: torch.Tensor
    pinned: torch.Tensor
    heads: Heads
    layer: int
    scores: Scores

    @property
    def layer_head(self) -> int:
        """Row of the layer's first head in the page table."""
        return self.layer * self.k.shape[1]

    @property
    def codes(self) -> tuple[torch.Tensor, ...]:
        """The quantised pool; where there is none, tensors that no kernel reads."""
        return self.pools.codes or (self.pools.keys, self.pools.values, self.lse, self.lse)

    @property
    def logits(self) -> torch.Tensor:
        """Learned sinks float32 [HQ]; where there are none, a tensor that no kernel reads."""
        return self.lse if self.scores.sinks is None else self.scores.sinks.detach().float().contiguous()

    @property
    def factors(self) -> tuple[float, float]:
        """(factor, cap) as `attend_tile` wants them."""
        if self.scores.softcap is None:
            return self.scores.scale * LOG2E, 0.0
        return 2 * LOG2E * self.scores.scale / self.scores.softcap, self.scores.softcap * LOG2E

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The first arguments of a kernel over queries."""
        return (
            self.q, self.k, self.v, self.out, self.lse, self.pools.keys, self.pools.values, *self.codes, self.table,
            self.slices, self.pinned, self.heads.rules, self.heads.rule_of_head, self.logits,
        )  # fmt: skip

    @property
    def numbers(self) -> tuple[float, ...]:
        """Its last ones: strides, the layer's place, spans, factors."""
        strides = (s for x in (self.q, self.k, self.v, self.out) for s in x.stride()[:2])
        spans = self.layer_head, self.heads.sink_tokens, self.heads.min_span_tokens
        return *strides, self.lse.stride(0), *self.table.stride()[:2], *spans, *self.factors

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel over queries is compiled for, beside its tile."""
        D = self.q.shape[2]
        return {
            "G": self.q.shape[1] // self.k.shape[1], "D": D, "DP": padded_head_dim(D), "QUANT": self.pools.codes is not None,
            "SOFTCAP": self.scores.softcap is not None, "HAS_SINKS": self.scores.sinks is not None,
            # Triton's interpreter multiplies no bfloat16.
            "UPCAST": INTERPRETED and self.q.dtype == torch.bfloat16, "PRECISION": "tf32x3",
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Partials:
    """Results of splits: float32 [slots, rows, D], and their log-sum-exp in base 2, [slots, rows]."""

    out: torch.Tensor
    lse: torch.Tensor


def attend_list(
    call: Call, work: torch.Tensor, tile: Tile, partials: Partials | None = None, short: bool = False
) -> None:
    """Run a work list, int32 [entries, 8]; columns as in `moa.kernels.paged.splits.Item`.

    Args:
        call: tensors and scores.
        work: the list; entries with slot -1 write `call.out` and `call.lse`, others their slot of `partials`.
        tile: its rows are the most that an entry has.
        partials: room for results of splits; None if no entry has a slot.
        short: no slice of the list has more than 63 tokens.
    """
    slots = (call.lse, call.lse) if partials is None else (partials.out, partials.lse)
    with on_device(call.q):
        attend_kernel[work.shape[0],](
            *call.tensors, work, *slots, *call.numbers, **call.constants, BM=tile.rows, BN=tile.keys, SHORT=short,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def merge(call: Call, items: torch.Tensor, tile: Tile, partials: Partials) -> None:
    """Join the partial results of items, int32 [items, 8], into `call.out` and `call.lse`."""
    constants = {name: call.constants[name] for name in ("G", "D", "DP", "HAS_SINKS")}
    with on_device(call.q):
        merge_kernel[items.shape[0],](
            call.out, call.lse, partials.out, partials.lse, call.slices, items, call.logits, *call.out.stride()[:2],
            call.lse.stride(0), **constants, BM=tile.rows,
        )  # fmt: skip


def append(call: Call, blocks: torch.Tensor) -> None:
    """Write what survives of the step's keys and values into pages.

    Args:
        call: tensors; queries and outputs are not looked at.
        blocks: slice and first token of blocks of `APPEND_TOKENS`, int32 [blocks, 2].
    """
    codes, D = call.codes, call.k.shape[2]
    is_float = codes[0].dtype == torch.float8_e4m3fn
    with on_device(call.q):
        append_kernel[blocks.shape[0], call.k.shape[1]](
            call.k, call.v, call.pools.keys, call.pools.values, *codes, call.table, call.slices, call.pinned,
            call.heads.rules, call.heads.rule_of_head, blocks, *(s for x in (call.k, call.v) for s in x.stride()[:2]),
            *call.table.stride()[:2], call.layer_head, call.heads.sink_tokens, call.heads.min_span_tokens,
            D=D, DP=padded_head_dim(D), BT=APPEND_TOKENS, QUANT=call.pools.codes is not None, FLOAT=is_float,
            MOST=most_code(codes[0].dtype),
        )  # fmt: skip


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, and a model may lie on several."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
