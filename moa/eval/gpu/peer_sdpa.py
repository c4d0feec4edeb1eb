"""torch's scaled_dot_product_attention, dense: FlashAttention and cuDNN named apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs, PartData
from moa.eval.gpu.subject import Built
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask


@dataclass(frozen=True, slots=True)
class Sdpa:
    """One backend of scaled_dot_product_attention over all keys of equal sequences."""

    name: str
    backend: SDPBackend
    device: torch.device
    mask: Mask = "dense"
    needs_s: float = 2.0
    is_ours: ClassVar[bool] = False

    def missing(self) -> str | None:
        """It comes with torch."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Mixed steps, and chunks under cuDNN."""
        if case.kind == "hybrid":
            return "one length per call"
        if case.kv != "bf16":
            return "no 8-bit keys and values"
        if case.kind == "chunk" and self.backend == SDPBackend.CUDNN_ATTENTION:
            return "torch has no causal mask for cuDNN that ends at the last key"
        return None

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Keys and values as one contiguous tensor per buffer set, which is more than a paged cache offers."""
        heads = case.heads.heads
        return Built(
            tuple(self._call(case, one.parts[0]) for one in inputs), lambda out: [unpack(out, case.kind, heads)]
        )

    def _call(self, case: Case, data: PartData) -> Call:
        q = pack_queries(case, data)
        options = {"is_causal": case.kind == "prefill", "enable_gqa": case.kind != "decode"}
        bias = causal_lower_right(*_lengths(data)) if case.kind == "chunk" else None

        def call() -> torch.Tensor:
            with sdpa_kernel(self.backend):
                return F.scaled_dot_product_attention(q, data.k, data.v, attn_mask=bias, **options)

        return call


def pack_queries(case: Case, data: PartData) -> torch.Tensor:
    """Queries as heads first, [S, HQ, C, D]; of a decode, a KV head's queries as rows, [S, HKV, G, D], its best form."""
    if case.kind == "decode":
        return data.q.view(-1, case.heads.kv_heads, case.heads.group, case.heads.head_dim)
    return data.q.transpose(1, 2)


def unpack(out: torch.Tensor, kind: str, heads: int) -> torch.Tensor:
    """Outputs in the layout of `pack_queries` as [S, C, HQ, D]."""
    if kind == "decode":
        return out.reshape(out.shape[0], 1, heads, out.shape[-1])
    return out.transpose(1, 2)


def _lengths(data: PartData) -> tuple[int, int]:
    return data.part.new, data.part.cached + data.part.new
