"""The sweep in Triton, for CUDA: forward and backward of the profiling attention, as `moa.profile.torch_sweep` has them.

Importing this module imports triton.
"""

from __future__ import annotations

import functools
import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moa.errors import ModelError
from moa.kernels.paged.tiles import Tile
from moa.profile import triton_kernels as kernels
from moa.profile.sweep import Estimator, Scores, SpanGrid
from moa.profile.triton_tiles import Tiles, padded_head_dim, tiles_for

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Shared memory that is assumed where there is no device to ask: the interpreter.
_INTERPRETED_SHARED_KIB = 160
_DELTA_ROWS = 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention.

    Args:
        q: [B, HQ, N, D] in float16, bfloat16 or float32, D at most 256.
        k: [B, HKV, N, D].
        v: [B, HKV, N, D].
        sinks: logits of a virtual key without value, one per query head [HQ] (gpt-oss), or None.
        scores: how scores come about.
        tiles: tile sizes; chosen for the device when None.

    Returns:
        out [B, HQ, N, D] and the natural log-sum-exp of the scores [B, HQ, N], sinks included, both float32.

    Raises:
        ModelError: a dtype, shape or device that the kernels do not take.
    """
    call = _Call.of(q, k, v, sinks, scores, tiles)
    b, hq, n, d = q.shape
    out = torch.empty(b, n, hq, d, dtype=torch.float32, device=q.device).transpose(1, 2)  # the layout models want
    lse = torch.empty(b, hq, n, dtype=torch.float32, device=q.device)
    tile = call.tiles.forward
    strides = [s for x in (call.q, call.k, call.v, out) for s in x.stride()[:3]]
    with _on(q.device):
        kernels.forward_kernel[b * hq, triton.cdiv(n, tile.rows)](
            call.q, call.k, call.v, out, lse, call.sinks, call.starts, *strides, hq, n, call.starts.stride(0), *call.terms, **call.options(tile),
        )  # fmt: skip
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scores: Scores,
    grid: SpanGrid,
    estimator: Estimator,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` and, in the same sweep, what each span would lose.

    Args:
        q, k, v, sinks, scores, tiles: as for `forward`.
        out, lse: what it returned.
        d_out: dLoss/dOut [B, HQ, N, D]; rounded to q's dtype.
        grid: spans and position buckets.
        estimator: "joint", "rows" or "moa"; see `Estimator`.

    Returns:
        dq, dk and dv in the inputs' shapes and dtypes, and the losses float64 [HKV, position buckets, spans]: sums of
        dL_i, with its sign for "joint", over rows, query heads of a KV head, and the batch.
    """
    call = _Call.of(q, k, v, sinks, scores, tiles)
    d_out = _rows_contiguous(d_out.to(q.dtype))
    with _on(q.device):
        delta = _delta(call, out, d_out)
        dq, losses = _sweep(call, lse, d_out, delta, grid, estimator)
        dk, dv = _key_value(call, lse, d_out, delta)
    return dq, dk, dv, losses


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class _Call:
    """The arguments that the kernels share."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor  # float32 [HQ]; -inf where the model has none
    starts: Tensor  # int32 [HKV, N]; 0 where nothing is attenuated
    terms: tuple[int, int, float, float, float]  # sink_tokens, window, scale, softcap, log2(attenuation)
    tiles: Tiles

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, tiles: Tiles | None) -> _Call:
        _check(q, k, v)
        n, device = q.shape[2], q.device
        if sinks is None:
            sinks = torch.full((q.shape[1],), -torch.inf, device=device)
        if scores.attenuation < 1 and scores.starts is not None:
            starts = scores.starts.clamp(min=0).to(device, torch.int32)
        else:
            starts = torch.zeros(1, n, dtype=torch.int32, device=device)
        starts = starts.expand(k.shape[1], n)
        window = n if scores.window_tokens is None else scores.window_tokens
        shift = math.log2(scores.attenuation)
        terms = (scores.sink_tokens, window, float(scores.scale), float(scores.softcap or 0), shift)
        chosen = tiles or tiles_for(q.shape[3], q.element_size(), _shared_kib(device))
        q, k, v = (_rows_contiguous(x) for x in (q, k, v))
        return cls(q, k, v, sinks.float().contiguous(), starts, terms, chosen)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def head(self) -> dict[str, int]:
        return {"D": self.q.shape[3], "DP": padded_head_dim(self.q.shape[3])}

    def options(self, tile: Tile) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {
            "G": self.group, **self.head, "BM": tile.rows, "BN": tile.keys, "SOFTCAP": self.terms[3] > 0,
            "PRECISION": "tf32x3", "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ModelError(f"the Triton backend profiles {_DTYPES}, all of one kind; got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape != v.shape or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        raise ModelError(
            "the Triton backend wants q [B, HQ, N, D] and k, v [B, HKV, N, D] with HQ a multiple of HKV; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, and a model may lie on several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _shared_kib(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SHARED_KIB
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]) // 1024


def _delta(call: _Call, out: Tensor, d_out: Tensor) -> Tensor:
    """D_i = dO_i . O_i, float32 [B, HQ, N]."""
    b, hq, n, _ = out.shape
    delta = torch.empty(b, hq, n, dtype=torch.float32, device=out.device)
    kernels.delta_kernel[b * hq, triton.cdiv(n, _DELTA_ROWS)](
        out, d_out, delta, *out.stride()[:3], *d_out.stride()[:3], hq, n, **call.head, BM=_DELTA_ROWS
    )
    return delta


def _sweep(
    call: _Call, lse: Tensor, d_out: Tensor, delta: Tensor, grid: SpanGrid, estimator: Estimator
) -> tuple[Tensor, Tensor]:
    """dq, and the losses float64 [HKV, position buckets, spans]."""
    (b, hq, n, _), tile, device = call.q.shape, call.tiles.sweep, call.q.device
    starts, buckets = row_blocks(grid, n, tile.rows)
    windows = _windows(grid).to(device)
    dq = torch.empty_like(call.q)
    partial = torch.empty(b * hq, len(buckets), len(windows), dtype=torch.float32, device=device)
    strides = [s for x in (call.q, call.k, call.v, d_out, dq) for s in x.stride()[:3]]
    kernels.sweep_kernel[b * hq, len(buckets)](
        call.q, call.k, call.v, d_out, lse, delta, call.sinks, call.starts, windows, starts.to(device), dq, partial,
        *strides, hq, n, call.starts.stride(0), len(buckets), *call.terms, SP=len(windows), JOINT=estimator != "moa",
        SIGNED=estimator == "joint", **call.options(tile),
    )  # fmt: skip
    sums = partial.double()[..., : len(grid.spans_tokens)]
    if estimator == "moa":
        sums = sums.flip(-1).cumsum(-1).flip(-1)  # what lies beyond a span's window lies beyond all shorter ones
    # A matrix product and no scatter: its order of summation is fixed.
    member = torch.nn.functional.one_hot(buckets, len(grid.position_edges) - 1).to(
        device, torch.float64
    )  # [M, buckets]
    per_head = member.mT @ sums  # [B * HQ, position buckets, spans]
    return dq, per_head.view(b, call.k.shape[1], call.group, *per_head.shape[1:]).sum((0, 2))


def _windows(grid: SpanGrid) -> Tensor:
    """Each span less its sinks, ascending, int32; filled up to a power of two with windows no text reaches."""
    windows = [tokens - grid.sink_tokens for tokens in grid.spans_tokens]
    room = triton.next_power_of_2(len(windows)) - len(windows)
    return torch.tensor(windows + room * [kernels.NO_SPAN.value], dtype=torch.int32)


def row_blocks(grid: SpanGrid, n_tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Blocks of at most `rows` rows, each within one position bucket.

    Returns:
        where they start and, last, where they end, int32 [M + 1]; and the bucket of each, int64 [M].
    """
    edges = [*grid.position_edges[:-1], n_tokens]  # rows beyond the last edge belong to the last bucket
    blocks = [
        (start, i)
        for i, (low, high) in enumerate(itertools.pairwise(edges))
        for start in range(low, min(high, n_tokens), rows)
    ]
    starts = torch.tensor([*(start for start, _ in blocks), n_tokens], dtype=torch.int32)
    return starts, torch.tensor([bucket for _, bucket in blocks])


def _key_value(call: _Call, lse: Tensor, d_out: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv, [B, HKV, N, D]."""
    (b, hkv, n, _), tile = call.k.shape, call.tiles.key_value
    n_blocks = triton.cdiv(n, tile.keys)
    dk, dv = torch.empty_like(call.k), torch.empty_like(call.v)
    strides = [s for x in (call.q, call.k, call.v, d_out, dk, dv) for s in x.stride()[:3]]
    kernels.key_value_kernel[b * hkv, n_blocks](
        call.q, call.k, call.v, d_out, lse, delta, call.starts, _rims(call.starts, call.terms[0], tile.keys, n_blocks),
        dk, dv, *strides, hkv * call.group, n, call.starts.stride(0), *call.terms, **call.options(tile),
    )  # fmt: skip
    return dk, dv


def _rims(starts: Tensor, sink_tokens: int, keys: int, n_blocks: int) -> Tensor:
    """For each block of keys the first row that attenuates some of it, and the first that all of it, int32 [HKV, M, 2].

    Sinks are never attenuated, so a block with a sink never is as a whole; N stands for no row.
    """
    begin = torch.arange(n_blocks, dtype=torch.int32, device=starts.device).mul(keys).repeat(len(starts), 1)  # [HKV, M]
    starts = starts.contiguous()
    some = torch.searchsorted(starts, begin.clamp(min=sink_tokens), right=True)
    whole = torch.searchsorted(starts, begin + keys).masked_fill(begin < sink_tokens, starts.shape[1])
    return torch.stack((some, whole), -1).to(torch.int32)
