"""FlashAttention as its own packages bring it, dense or with one window for all heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs, PartData
from moa.eval.gpu.subject import Built, why_not
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask

# package -> what a table calls it: the usual one is FlashAttention 2, the other one 3, for Hopper
PACKAGES = {"flash_attn": "FlashAttention 2", "flash_attn_interface": "FlashAttention 3"}


@dataclass(frozen=True, slots=True)
class FlashAttention:
    """One of the packages, under one of two masks: dense, or a window as long as the plan's mean span, without sinks."""

    package: Literal["flash_attn", "flash_attn_interface"]
    mask: Mask = "dense"
    needs_s: float = 2.0
    is_ours: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As in tables."""
        return PACKAGES[self.package] + (", equal windows" if self.mask == "equal length" else "")

    def missing(self) -> str | None:
        """Why the package cannot be imported."""
        return why_not(self.package)

    def refuses(self, case: Case) -> str | None:
        """Mixed steps, 8-bit keys and values, and windows where nothing is dropped."""
        if case.kind == "hybrid":
            return "not measured: its mixed batches take another entry point"
        if case.kv != "bf16":
            return "8-bit keys and values are not measured"
        return "the plan is dense" if self.mask == "equal length" and case.pattern.is_dense else None

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Views of the tensors as [S, N, heads, D]; a decode over a window gets a cache of that length."""
        module = import_module(self.package)
        calls = tuple(self._call(module, case, one.parts[0]) for one in inputs)
        return Built(calls, lambda out: [out])

    def _call(self, module: Any, case: Case, data: PartData) -> Call:
        width = case.pattern.mean_span(case.tokens) if self.mask == "equal length" else case.tokens
        if case.kind == "decode":
            k, v = (x[:, :, -width:].transpose(1, 2) for x in (data.k, data.v))  # [S, W, HKV, D]
            lengths = torch.full((data.part.sequences,), width, dtype=torch.int32, device=data.q.device)
            return _first(lambda: module.flash_attn_with_kvcache(data.q, k, v, cache_seqlens=lengths, causal=True))
        k, v = data.k.transpose(1, 2), data.v.transpose(1, 2)  # [S, N, HKV, D]
        reach = (width - 1, 0) if self.mask == "equal length" else (-1, -1)
        return _first(lambda: module.flash_attn_func(data.q, k, v, causal=True, window_size=reach))


def _first(call: Callable[[], Any]) -> Call:
    """Some versions return the log-sum-exp as well."""

    def output() -> torch.Tensor:
        found = call()
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return output
