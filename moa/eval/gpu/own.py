"""Our Triton kernels by themselves: attention over pages, without the host's bookkeeping and the append of a step.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from moa.eval.gpu.cases import Case, Kind
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.subject import Built
from moa.eval.gpu.targets import OURS, PLANNER, SERIAL
from moa.eval.gpu.timing import Call
from moa.eval.gpu.whole_step import FILL_TOKENS, layer_rules, sequences_of, step_batch
from moa.eval.gpu.work import Mask
from moa.kernels.batch import Batch
from moa.kernels.paged import backend, planner, splits
from moa.kernels.paged.backend import Ready
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.paged.pool import KVDtype
from moa.kernels.paged.tiles import DECODE_ROWS
from moa.kernels.scores import Scores

KV_DTYPES: dict[str, KVDtype | None] = {"bf16": None, "fp8": "fp8", "int8": "int8"}
_FP8_CAPABILITY = (8, 9)
# Layers whose splits are planned at once, as in a model of Llama-3-8B's depth.
PLANNED_LAYERS = 32


@dataclass(frozen=True, slots=True)
class Kernels:
    """Attention of a step that is ready to launch, over and over; layers are the sets of buffers.

    A mixed step runs its prompts and its decodes one launch after the other.
    """

    name: str
    kinds: tuple[Kind, ...]
    needs_s: float = 4.0
    mask: Mask = "same"
    is_ours: ClassVar[bool] = True

    @classmethod
    def separate(cls) -> Kernels:
        """Steps of one kind."""
        return cls(OURS, ("prefill", "chunk", "decode"))

    @classmethod
    def serial(cls) -> Kernels:
        """Mixed steps as two launches."""
        return cls(SERIAL, ("hybrid",))

    def missing(self) -> str | None:
        """It comes with moa."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Other kinds of steps, and E4M3 where the device has none."""
        if case.kind not in self.kinds:
            return f"measured for {', '.join(self.kinds)} only"
        if case.kv == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < _FP8_CAPABILITY:
            return "E4M3 needs compute capability 8.9"
        return None

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Pages of all layers, filled with the cached tokens, and the launches of the step."""
        kv, ready = ready_layers(case, inputs)

        def call(one: Ready) -> Call:
            def run() -> torch.Tensor:
                backend.run(one)
                return one.call.out

            return run

        return Built(tuple(map(call, ready)), unpack_parts(case), kv.kv_bytes // len(inputs))


@dataclass(frozen=True, slots=True)
class Planner:
    """The plan of a decode's splits for all layers of a model, which a step makes once, on the device."""

    name: str = PLANNER
    mask: Mask = "same"
    needs_s: float = 3.0
    is_ours: ClassVar[bool] = True

    def missing(self) -> str | None:
        """It comes with moa."""
        return None

    def refuses(self, case: Case) -> str | None:
        """All but decodes in bfloat16: the plan is the same for other formats."""
        return None if case.kind == "decode" and case.kv == "bf16" else "only decodes have splits"

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """The planner's launch; its error is 0 if every number equals the reference's."""
        _, ready = ready_layers(case, inputs[:1])
        (one,) = ready
        rules, of_head = rules_of_layers(case, PLANNED_LAYERS, one)
        tiles = torch.from_numpy(splits.decode_tiles(case.batch)).to(one.call.q.device)
        heads = one.call.heads
        given = planner.PlannerInput(
            one.call.slices, one.call.pinned, tiles, rules, of_head, heads.sink_tokens, heads.min_span_tokens
        )
        slots = thread_blocks(one.call.q.device)
        lists = planner.SplitLists.empty(len(of_head), case.batch, case.heads.kv_heads, slots, tiles.device)

        def run() -> torch.Tensor:
            planner.plan_splits(given, case.heads.group, DECODE_ROWS, lists)
            return lists.work

        def error() -> float:
            run()
            return 0.0 if plans_agree(given, lists, case.heads.group, slots) else float("inf")

        return Built((run,), lambda out: [out], error=error)


def thread_blocks(device: torch.device) -> int:
    """Thread blocks of decode that a device runs at once; two where kernels are interpreted."""
    if device.type != "cuda":
        return 2
    return backend.DECODES_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def rules_of_layers(case: Case, layers: int, one: Ready) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rules int64 [R, 3] and the rule of each head, int32 [layers, HKV], the pattern's layers in turn."""
    pattern = case.pattern.rules
    native = int(one.call.heads.rules[0, 2])
    pairs = np.stack((pattern.alpha, pattern.beta_fixed), -1)[np.arange(layers) % case.pattern.layers]  # [L, HKV, 2]
    distinct, of_head = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
    rules = np.column_stack((distinct, np.full(len(distinct), native))).astype(np.int64)
    device = one.call.q.device
    return (
        torch.from_numpy(rules).to(device),
        torch.from_numpy(of_head.reshape(layers, -1).astype(np.int32)).to(device),
    )


def plans_agree(given: planner.PlannerInput, lists: planner.SplitLists, group: int, slots: int) -> bool:
    """Whether the device's plan is the reference's, in the layers whose rules differ."""
    step = splits.Step(given.slices.cpu().numpy(), given.pinned.cpu().numpy(), group)
    of_head, tiles = given.rule_of_head.cpu().numpy(), given.tiles.cpu().numpy()
    rules = splits.HeadRules(given.rules.cpu().numpy(), of_head, given.sink_tokens, given.min_span_tokens)
    for layer in np.unique(of_head, axis=0, return_index=True)[1].tolist():
        work, items = splits.plan_splits(step, tiles, DECODE_ROWS, rules, layer, slots)
        found = lists.work[layer].cpu().numpy(), lists.items[layer].cpu().numpy()
        if not (np.array_equal(found[0], work) and np.array_equal(found[1], items)):
            return False
    return True


def ready_layers(case: Case, inputs: Sequence[Inputs]) -> tuple[PagedMemory, list[Ready]]:
    """A memory with the cached tokens of every layer, and the case's step made ready in each."""
    kv = PagedMemory(layer_rules(case, inputs), kv_dtype=KV_DTYPES[case.kv])
    fill_pages(kv, case, inputs)
    batch, scores = step_batch(case), Scores(case.heads.head_dim**-0.5)
    return kv, [
        backend.prepare(*one.packed(), kv, layer, batch, scores)  # the step's pages are taken by the first
        for layer, one in enumerate(inputs)
    ]


def fill_pages(kv: PagedMemory, case: Case, inputs: Sequence[Inputs]) -> None:
    """Append the cached tokens of every sequence without attending to them."""
    scores, heads = Scores(1.0), case.heads
    for s, (i, row) in enumerate(sequences_of(case)):
        kv.add(s, pinned_tokens=case.tokens)
        cached = case.parts[i].cached
        for start in range(0, cached, FILL_TOKENS):
            stop = min(start + FILL_TOKENS, cached)
            batch = Batch.pack([(s, stop - start, start)])
            for layer, one in enumerate(inputs):
                data = one.parts[i]
                k, v = (x[row, :, start:stop].transpose(0, 1).contiguous() for x in (data.k, data.v))  # [T, HKV, D]
                q = k.new_empty(1, heads.heads, heads.head_dim).expand(stop - start, -1, -1)  # not looked at
                backend.append(backend.prepare(q, k, v, kv, layer, batch, scores), kv)


def unpack_parts(case: Case) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Outputs [T, HQ, D] as [S, C, HQ, D] per part."""
    sizes = [part.sequences * part.new for part in case.parts]

    def unpack(out: torch.Tensor) -> list[torch.Tensor]:
        pieces = torch.split(out, sizes)
        return [
            piece.reshape(part.sequences, part.new, *out.shape[1:])
            for piece, part in zip(pieces, case.parts, strict=True)
        ]

    return unpack
