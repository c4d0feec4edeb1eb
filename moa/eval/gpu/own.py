"""Our Triton kernels by themselves: attention over pages, without the host's bookkeeping and the append of a step.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.own_mixed import Mixed
from moa.eval.gpu.own_pages import KV_DTYPES, ready_layers, run_layers, unpack_parts
from moa.eval.gpu.subject import Built
from moa.eval.gpu.targets import OURS, PLANNER
from moa.eval.gpu.work import Mask
from moa.kernels.paged import planner, splits
from moa.kernels.paged.backend import Ready
from moa.kernels.paged.configs import device_of, takes_kv_kind
from moa.kernels.paged.lists import Machine

# Layers whose splits are planned at once, as in a model of Llama-3-8B's depth.
PLANNED_LAYERS = 32


@dataclass(frozen=True, slots=True)
class Kernels:
    """Attention of a step that is ready to launch, over and over; layers are the sets of buffers.

    In a mixed step decodes are spread among the prompts' tiles, in one launch.
    """

    name: str = OURS
    needs_s: float = 4.0
    mask: Mask = "same"
    is_ours: ClassVar[bool] = True

    def missing(self) -> str | None:
        """It comes with moa."""
        return None

    def refuses(self, case: Case) -> str | None:
        """E4M3 where the device has none."""
        here = device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        kind = KV_DTYPES[case.kv] or "model"
        return None if takes_kv_kind(kind, here) else "E4M3 needs compute capability 8.9"

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Pages of all layers, filled with the cached tokens, and the launches of the step."""
        if case.kind == "hybrid":
            return Mixed("spread").build(case, inputs)
        kv, ready = ready_layers(case, inputs)
        return Built(run_layers(ready), unpack_parts(case), kv.kv_bytes // len(inputs))


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
        machine, q = Machine.of(one.call.q.device), one.call.q
        tile = machine.table.tile("decode", q.shape[2], q.dtype, "model", case.heads.group)
        slots = machine.slots(tile)
        lists = planner.SplitLists.empty(len(of_head), case.batch, case.heads.kv_heads, slots, tiles.device)

        def run() -> torch.Tensor:
            planner.plan_splits(given, case.heads.group, tile.rows, lists)
            return lists.work

        def error() -> float:
            run()
            return 0.0 if plans_agree(given, lists, case.heads.group, tile.rows, slots) else float("inf")

        return Built((run,), lambda out: [out], error=error)


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


def plans_agree(given: planner.PlannerInput, lists: planner.SplitLists, group: int, rows: int, slots: int) -> bool:
    """Whether the device's plan is the reference's, in the layers whose rules differ."""
    step = splits.Step(given.slices.cpu().numpy(), given.pinned.cpu().numpy(), group)
    of_head, tiles = given.rule_of_head.cpu().numpy(), given.tiles.cpu().numpy()
    rules = splits.HeadRules(given.rules.cpu().numpy(), of_head, given.sink_tokens, given.min_span_tokens)
    for layer in np.unique(of_head, axis=0, return_index=True)[1].tolist():
        work, items = splits.plan_splits(step, tiles, rows, rules, layer, slots)
        found = lists.work[layer].cpu().numpy(), lists.items[layer].cpu().numpy()
        if not (np.array_equal(found[0], work) and np.array_equal(found[1], items)):
            return False
    return True
