"""Mixed steps of our Triton kernels: prompts and decodes in one launch, and the two launches that it is held against.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.own_pages import ready_layers, thread_blocks, unpack_parts
from moa.eval.gpu.subject import Built
from moa.eval.gpu.targets import OURS, SERIAL, TICKETS
from moa.eval.gpu.timing import Call
from moa.eval.gpu.work import Mask
from moa.kernels.paged import hybrid, launch, planner, splits
from moa.kernels.paged.backend import Ready
from moa.kernels.paged.configs import Kernel, device_of, table_for
from moa.kernels.paged.lists import ALL_UNITS
from moa.kernels.paged.tiles import Tile

NAMES = {"spread": OURS, "tickets": TICKETS, "serial": SERIAL}
# Programs of a launch with tickets have a multiprocessor; where kernels are interpreted, one of so many in turn.
_INTERPRETED_SMS = 3


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mixed step: decodes spread among prefill tiles, drawn by tickets, or one launch after the other.

    Both sides run with the tiles that the device's table has for it, which are smaller in one launch than in two.
    """

    how: Literal["spread", "tickets", "serial"]
    mask: Mask = "same"
    needs_s: float = 4.0
    is_ours: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As in tables."""
        return NAMES[self.how]

    def missing(self) -> str | None:
        """It comes with moa."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Steps of one kind."""
        return None if case.kind == "hybrid" else "measured for mixed steps only"

    def build(self, case: Case, inputs: Sequence[Inputs]) -> Built:
        """Pages, work lists and room for partial results of all layers."""
        kv, ready = ready_layers(case, inputs)
        tiles = self._tiles(case, ready[0])
        prefill = prefill_entries(case, ready[0], tiles[0])
        plan = plan_decodes(case, ready[0], tiles[1])
        calls = self._calls(ready, prefill, plan, tiles)
        return Built(calls, unpack_parts(case), kv.kv_bytes // len(inputs))

    def _tiles(self, case: Case, one: Ready) -> tuple[Tile, Tile]:
        table, q = table_for(device_of(one.call.q.device)), one.call.q
        names: tuple[Kernel, Kernel] = ("hybrid_prefill", "hybrid_decode")
        if self.how == "serial":
            names = ("prefill", "decode")
        rows = (case.chunk * case.heads.group, case.heads.group)
        first, second = (
            table.tile(name, q.shape[2], q.dtype, "model", count) for name, count in zip(names, rows, strict=True)
        )
        return first, second

    def _calls(
        self, ready: Sequence[Ready], prefill: torch.Tensor, plan: planner.SplitLists, tiles: tuple[Tile, Tile]
    ) -> tuple[Call, ...]:
        device = ready[0].call.q.device
        programs = len(prefill) + plan.work.shape[1]
        counters, tickets = make_tickets(len(ready), programs, device)

        def call(layer: int, one: Ready) -> Call:
            shape = (plan.work.shape[1], tiles[1].rows, one.call.q.shape[2])
            partials = launch.Partials(torch.empty(shape, device=device), torch.empty(shape[:2], device=device))
            work, items, live = plan.work[layer], plan.items[layer], plan.live[layer : layer + 1]

            def run() -> torch.Tensor:
                if self.how == "serial":
                    launch.attend_list(one.call, prefill, tiles[0])
                    launch.attend_list(one.call, work, tiles[1], partials, short=True)
                else:
                    if self.how == "tickets" and layer == 0:
                        counters.zero_()  # once for all layers of a step
                    together = hybrid.HybridWork(prefill, work, live, *tiles)
                    drawn = tickets[layer] if self.how == "tickets" else None
                    hybrid.attend_hybrid(one.call, together, partials, drawn)
                launch.merge(one.call, items, tiles[1], partials)
                return one.call.out

            return run

        return tuple(call(layer, one) for layer, one in enumerate(ready))


def make_tickets(layers: int, programs: int, device: torch.device) -> tuple[torch.Tensor, list[hybrid.Tickets]]:
    """Counters of all layers in one tensor, and each layer's tickets."""
    is_gpu = device.type == "cuda"
    n_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else _INTERPRETED_SMS
    counters = torch.zeros(layers, 2 + n_sms, dtype=torch.int32, device=device)
    told = None if is_gpu else torch.arange(programs, dtype=torch.int32) % n_sms
    return counters, [hybrid.Tickets(row, told) for row in counters]


def prefill_entries(case: Case, one: Ready, tile: Tile) -> torch.Tensor:
    """Whole tiles of the prompts, longest first, KV heads side by side: int32 [entries, 8], columns as in `splits.Item`."""
    step = splits.Step(one.call.slices.cpu().numpy(), one.call.pinned.cpu().numpy(), case.heads.group)
    tiles = splits.row_tiles(step, tile.rows)
    tiles = splits.order_tiles(step, tiles[tiles[:, 0] < case.prompts], tile.rows, one.arena.rules)
    n_heads, counts = case.heads.kv_heads, splits.count_rows(step, tiles, tile.rows)
    work = np.zeros((len(tiles) * n_heads, len(splits.Item._fields)), dtype=np.int32)
    work[:, 0], work[:, 2], work[:, 3] = (np.repeat(x, n_heads) for x in (tiles[:, 0], tiles[:, 1], counts))
    work[:, 1] = np.tile(np.arange(n_heads), len(tiles))
    work[:, 5], work[:, 6], work[:, 7] = ALL_UNITS, -1, 1
    return torch.from_numpy(work).to(one.call.q.device)


def plan_decodes(case: Case, one: Ready, tile: Tile) -> planner.SplitLists:
    """The splits of the decodes, which come behind the prompts, in all layers."""
    device, heads = one.call.q.device, one.call.heads
    decodes = np.arange(case.prompts, case.prompts + case.batch)
    tiles = torch.from_numpy(np.stack((decodes, np.zeros_like(decodes)), 1).astype(np.int32)).to(device)
    n_layers, n_heads = heads.rule_of_head.shape
    lists = planner.SplitLists.empty(n_layers, len(decodes), n_heads, thread_blocks(device), device)
    given = planner.PlannerInput(
        one.call.slices,
        one.call.pinned,
        tiles,
        heads.rules,
        heads.rule_of_head,
        heads.sink_tokens,
        heads.min_span_tokens,
    )
    planner.plan_splits(given, case.heads.group, tile.rows, lists)
    return lists
