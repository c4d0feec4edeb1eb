"""FlashInfer: ragged prefill, paged decode and POD-Attention, dense or with windows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs, PartData
from moa.eval.gpu.subject import Built, why_not
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask

PAGE, WORKSPACE_BYTES = 64, 256 << 20


@dataclass(frozen=True, slots=True)
class FlashInfer:
    """Its wrappers, planned once per case as they are for all layers of a step; planning is not timed.

    Under "equal length" every head has one window as long as the plan's mean span, without sinks: what FlashInfer offers
    for the same KV memory.
    """

    device: torch.device
    mask: Mask = "dense"
    needs_s: float = 10.0
    is_ours: ClassVar[bool] = False
    _workspaces: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in tables."""
        return "FlashInfer" + (", equal windows" if self.mask == "equal length" else "")

    def missing(self) -> str | None:
        """Why the package cannot be imported."""
        return why_not("flashinfer")

    def refuses(self, case: Case) -> str | None:
        """8-bit keys and values, several prompts at once in a mixed step, and windows where nothing is dropped."""
        if case.kv != "bf16":
            return "8-bit keys and values are not measured"
        if self.mask == "equal length" and case.pattern.is_dense:
            return "the plan is dense"
        if case.kind == "hybrid" and (case.prompts > 1 or self.mask != "dense"):
            return "POD-Attention is measured with one prompt and no windows"
        return None

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Plan for the case's shapes, and lay keys and values out as the wrappers want them."""
        library = import_module("flashinfer")
        if case.kind == "hybrid":
            return self._pod(library, case, inputs)
        make = self._decode if case.kind == "decode" else self._prefill
        shape = (case.batch, -1, case.heads.heads, case.heads.head_dim)
        return Built(make(library, case, [one.parts[0] for one in inputs]), lambda out: [out.view(shape)])

    def _window(self, case: Case) -> int | None:
        return case.pattern.mean_span(case.tokens) if self.mask == "equal length" else None

    def _workspace(self) -> torch.Tensor:
        if "one" not in self._workspaces:
            self._workspaces["one"] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        return self._workspaces["one"]

    def _ends(self, count: int, step: int) -> torch.Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=self.device) * step

    def _prefill(self, library: Any, case: Case, data: Sequence[PartData]) -> tuple[Call, ...]:
        part, heads, width = data[0].part, case.heads, self._window(case)
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(self._workspace(), "NHD")
        wrapper.plan(
            self._ends(part.sequences, part.new),
            self._ends(part.sequences, part.cached + part.new),
            heads.heads,
            heads.kv_heads,
            heads.head_dim,
            causal=True,
            window_left=-1 if width is None else width - 1,
            q_data_type=data[0].q.dtype,
        )

        def call(one: PartData) -> Call:
            q, k, v = one.q.flatten(0, 1), *(x.transpose(1, 2).flatten(0, 1).contiguous() for x in (one.k, one.v))
            return lambda: wrapper.run(q, k, v)

        return tuple(map(call, data))

    def _decode(self, library: Any, case: Case, data: Sequence[PartData]) -> tuple[Call, ...]:
        width = self._window(case) or case.tokens
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(self._workspace(), "HND", use_tensor_cores=True)
        wrapper.plan(
            *self._pages(case, data[0], width), PAGE, q_data_type=data[0].q.dtype, kv_data_type=data[0].k.dtype
        )

        def call(one: PartData) -> Call:
            q, cache = one.q[:, 0], paged(one, width)
            return lambda: wrapper.run(q, cache)

        return tuple(map(call, data))

    def _pages(self, case: Case, data: PartData, width: int) -> tuple[torch.Tensor | int, ...]:
        """Page table of equal sequences, and the head shape, in the order of `plan`'s arguments."""
        count, heads = -(-width // PAGE), case.heads
        sequences = data.part.sequences
        indices = torch.arange(sequences * count, dtype=torch.int32, device=self.device)
        last = torch.full((sequences,), (width - 1) % PAGE + 1, dtype=torch.int32, device=self.device)
        return self._ends(sequences, count), indices, last, heads.heads, heads.kv_heads, heads.head_dim

    def _pod(self, library: Any, case: Case, inputs: Sequence[Inputs]) -> Built:
        decodes = [one.parts[1] for one in inputs]
        wrapper = library.PODWithPagedKVCacheWrapper(self._workspace(), "HND")
        pages = self._pages(case, decodes[0], case.tokens)
        wrapper.plan(*pages, PAGE, q_data_type=decodes[0].q.dtype, kv_data_type=decodes[0].k.dtype)
        results: list[torch.Tensor] = []

        def call(one: Inputs) -> Call:
            prompt, decode = one.parts
            q, k, v = prompt.q[0], *(x[0].transpose(0, 1).contiguous() for x in (prompt.k, prompt.v))
            cache = paged(decode, case.tokens)

            def run() -> torch.Tensor:
                results[:] = wrapper.run(q, k, v, decode.q[:, 0], cache, causal_p=True, kv_layout_p="NHD")
                return results[0]

            return run

        return Built(tuple(map(call, inputs)), lambda out: [out[None], results[1][:, None]])


def paged(data: PartData, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `width` tokens in pages, keys and values each [pages, HKV, 64, D], sequences one after the other."""
    missing = -width % PAGE

    def lay(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x[:, :, -width:], (0, 0, 0, missing))  # [S, HKV, pages * 64, D]
        pages = padded.view(*x.shape[:2], -1, PAGE, x.shape[3])  # [S, HKV, pages, 64, D]
        return pages.transpose(1, 2).flatten(0, 1).contiguous()

    return lay(data.k), lay(data.v)
