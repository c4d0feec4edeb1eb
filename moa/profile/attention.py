"""Attention that profiles itself: its backward pass computes the gradients and, in the same sweep, the influence.

Scores of keys outside a reference span are shifted by log(lambda): gradients vanish where a dense model is already sure,
and come back on the way to the sparse model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from moa.errors import ModelError
from moa.kernels.paged.tiles import LARGEST_HEAD_DIM
from moa.profile import torch_sweep
from moa.profile.sweep import Estimator, Scores, SpanGrid
from moa.spans import SpanRules

NAME = "moa_profile"


@dataclass(slots=True)
class Probe:
    """What one profiling pass wants and what it has summed up so far.

    Args:
        grid: where the losses are sampled.
        estimator: what is summed up.
        attenuation: lambda in (0, 1]; 1 is the dense model.
        reference: spans outside of which scores are attenuated: a plan's [L, HKV], or one for all heads [1, 1].
        losses: layer -> float64 [HKV, position buckets, spans], summed over rows and query heads.
        backends: who computed them, "torch" or "triton".
    """

    grid: SpanGrid
    estimator: Estimator
    attenuation: float
    reference: SpanRules
    losses: dict[int, Tensor] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)

    def reference_starts(self, layer: int, n_tokens: int) -> Tensor:
        """First key of each row's reference window, int64 [HKV, N], or [1, N] for all heads, on the CPU."""
        at = slice(layer, layer + 1) if len(self.reference.alpha) > 1 else slice(1)
        rules = replace(self.reference, alpha=self.reference.alpha[at], beta_fixed=self.reference.beta_fixed[at])
        return torch.from_numpy(rules.window_start(np.arange(n_tokens), pinned_tokens=n_tokens)[0])

    def add(self, layer: int, losses: Tensor) -> None:
        """Take in a layer's losses, float64 [HKV, position buckets, spans]."""
        self.losses[layer] = losses + self.losses.get(layer, 0.0)


# Not a context variable: autograd may run the backward pass, and what it recomputes there, on threads of its own.
_active: list[Probe] = []


@contextmanager
def probing(probe: Probe) -> Iterator[None]:
    """All attention inside the block reports to `probe`."""
    _active.append(probe)
    try:
        yield
    finally:
        _active.pop()


def register() -> None:
    """Make the attention function known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, HQ, N, D], key and value [B, HKV, N, D], sink logits s_aux [HQ] -> [B, N, HQ, D]."""
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ModelError("profiling takes whole, unpadded sequences without a cache")
    if not _active:
        raise ModelError(f"attention {NAME!r} runs outside of a profiling pass; use moa.profile.collect")
    probe, n_tokens, layer = _active[-1], query.shape[2], int(module.layer_idx)  # type: ignore[arg-type]  # typed as any module
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window_tokens=None if sliding_window is None or sliding_window >= n_tokens else sliding_window,
        attenuation=probe.attenuation,
        sink_tokens=probe.grid.sink_tokens,
        starts=None if probe.attenuation == 1.0 else probe.reference_starts(layer, n_tokens),
    )
    out = _ProfiledAttention.apply(query, key, value, s_aux, scores, layer, probe)  # type: ignore[no-untyped-call]  # torch does not type it
    # computed in float32 at least: half precision loses the small differences that influence is made of
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def backend_for(query: Tensor) -> ModuleType:
    """Who computes: Triton's kernels on NVIDIA GPUs for what they take, PyTorch for all else."""
    if _backend_name(query.device, query.dtype, query.shape[-1]) == "torch":
        return torch_sweep
    from moa.profile import triton_sweep  # imports triton, which not every machine has

    return triton_sweep


def backend_names(devices: Iterable[torch.device], dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Who will compute for a model on these devices, sorted."""
    return tuple(sorted({_backend_name(device, dtype, head_dim) for device in devices}))


def _backend_name(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    taken = device.type == "cuda" and dtype != torch.float64 and head_dim <= LARGEST_HEAD_DIM
    there = torch.version.hip is None and find_spec("triton") is not None
    return "triton" if taken and there else "torch"


class _ProfiledAttention(torch.autograd.Function):
    """The one place that chooses who computes: forward gives (out, log-sum-exp), backward gradients and losses."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, layer: int, probe: Probe
    ) -> Tensor:
        out: Tensor
        out, lse = backend_for(q).forward(q, k, v, sinks, scores)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.scores, ctx.layer, ctx.probe = scores, layer, probe
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        probe: Probe = ctx.probe
        backend = backend_for(q)
        dq, dk, dv, losses = backend.backward(
            q, k, v, sinks, out, lse, grads[0], ctx.scores, probe.grid, probe.estimator
        )
        probe.backends.add(backend.__name__.rpartition(".")[2].removesuffix("_sweep"))
        probe.add(ctx.layer, losses)
        return dq, dk, dv, None, None, None, None
