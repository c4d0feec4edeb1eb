"""What a step launches: tiles of prefill, splits, blocks to append. Made once, shared by all layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from moa.kernels.paged.configs import Device, Kernel, KVKind, TileTable, device_of, table_for
from moa.kernels.paged.hybrid import Tickets
from moa.kernels.paged.launch import APPEND_TOKENS, Heads
from moa.kernels.paged.planner import PlannerInput, SplitLists, plan_splits
from moa.kernels.paged.pool import Int32Array
from moa.kernels.paged.predict import predict, rates_of
from moa.kernels.paged.splits import UNIT_TOKENS, HeadRules, Step, count_rows, order_tiles, row_tiles
from moa.kernels.paged.tiles import Tile
from moa.spans import Int64Array

ALL_UNITS = 1 << 30
LARGEST_ROWS = 1 << 30  # more than any tile has: asks for the largest
# How prefill tiles and decodes of one step are launched: together where that is predicted to win; always apart; always
# together, spread over the grid or by tickets of the multiprocessors.
Launch = Literal["serial", "spread", "tickets"]
Launches = Literal["auto", "serial", "spread", "tickets"]
LAUNCHES: tuple[Launches, ...] = get_args(Launches)
# Multiprocessors that are assumed where kernels are interpreted.
_INTERPRETED_SMS = 2


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Whole:
    """Tiles that one thread block each works through: entries int32 [entries, 8] for all layers, longest first."""

    work: torch.Tensor
    tile: Tile


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Cut:
    """Items cut into splits, per layer; `short` if no slice has more than 63 tokens."""

    plan: SplitLists
    tile: Tile
    short: bool


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Lists:
    """Work of a step for queries with one number of heads per KV head.

    Args:
        prefill: whole tiles, or cut where they are too few for the GPU; None without prefill.
        decode: decodes and drafts; None without.
        launch: how both are launched: "serial", or together "spread" over the grid or by "tickets".
        reason: why so.
        tickets: counters of each layer, where tickets are drawn.
        blocks: slice and first token of what one program appends, int32 [blocks, 2].
    """

    prefill: Whole | Cut | None
    decode: Cut | None
    launch: Launch
    reason: str
    tickets: list[Tickets]
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Given:
    """A step to cut into work.

    Args:
        step: its slices on the host.
        slices: offset, tokens, position and slot, int32 [S, 4], on the device.
        pinned: pinned lengths or 0, int64 [S], on the device.
        heads: rules on the device.
        rules: the same on the host.
        kv: how pages beyond the sinks are stored.
        launches: how to launch a mixed step.
    """

    step: Step
    slices: torch.Tensor
    pinned: torch.Tensor
    heads: Heads
    rules: HeadRules
    kv: KVKind
    launches: Launches

    @property
    def n_heads(self) -> int:
        return int(self.rules.rule_of_head.shape[1])


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device runs, and with which tiles."""

    device: Device
    table: TileTable
    n_sms: int

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Machine:
        """That of a torch device.

        Raises:
            ResourceError: it has too little shared memory.
        """
        facts = device_of(device)
        is_cuda = device.type == "cuda"
        n_sms = int(torch.cuda.get_device_properties(device).multi_processor_count) if is_cuda else _INTERPRETED_SMS
        return cls(facts, table_for(facts), n_sms)

    def slots(self, tile: Tile) -> int:
        """Thread blocks of a tile that run at once."""
        return tile.per_sm * self.n_sms


def make_lists(given: Given, q: torch.Tensor) -> Lists:
    """Cut a step into work for queries q [T, HQ, D], of which size, dtype and device count.

    Raises:
        ResourceError: a thread block of the device has too little shared memory.
    """
    machine = Machine.of(q.device)
    tile_of = functools.partial(machine.table.tile, head_dim=q.shape[2], dtype=q.dtype, kv=given.kv)
    launch, reason = _launch(given, machine, q, tile_of)
    kinds: tuple[Kernel, Kernel] = ("prefill", "decode") if launch == "serial" else ("hybrid_prefill", "hybrid_decode")
    rows = given.step.slices[:, 1] * given.step.group  # [S]
    largest = tile_of(kinds[1], rows=LARGEST_ROWS).rows
    chunks, decodes = np.flatnonzero(rows > largest), np.flatnonzero((rows > 0) & (rows <= largest))
    prefill = decode = None
    if len(chunks):
        tile = tile_of(kinds[0], rows=int(rows.max()))
        prefill = _prefill(given, chunks, tile, 0 if launch != "serial" else machine.slots(tile))
    if len(decodes):
        tile = tile_of(kinds[1], rows=int(rows[decodes].max()))
        at = np.stack((decodes, np.zeros_like(decodes)), 1).astype(np.int32)
        is_short = int(given.step.slices[decodes, 1].max()) < UNIT_TOKENS
        decode = Cut(_plan(given, at, tile, machine.slots(tile)), tile, is_short)
    tickets = _tickets(given, machine, q.device, prefill, decode) if launch == "tickets" else []
    return Lists(prefill, decode, launch, reason, tickets, _blocks(given.step).to(q.device))


def _launch(given: Given, machine: Machine, q: torch.Tensor, tile_of: Callable[..., Tile]) -> tuple[Launch, str]:
    """How to launch, and why: a step of one kind has one way only."""
    step, prefill, decode = given.step, *(tile_of(kind, rows=1) for kind in ("hybrid_prefill", "hybrid_decode"))
    rows = step.slices[:, 1] * step.group
    is_decode = (rows > 0) & (rows <= decode.rows)
    if not is_decode.any() or not (rows > decode.rows).any():
        return "serial", "prefill and decodes do not meet"
    if given.launches != "auto":
        return given.launches, "asked for"
    if ((rows > decode.rows) & (rows <= tile_of("decode", rows=LARGEST_ROWS).rows)).any():
        return "serial", "drafts too long to be cut in one launch"
    if q.element_size() != 2:
        return "serial", "rates are known for 16-bit queries only"
    rates = rates_of(machine.device.name)
    if rates is None:
        return "serial", "rates of this GPU are not known"
    tiles = row_tiles(step, prefill.rows)
    parts = [(tiles[is_decode[tiles[:, 0]] == which], tile.rows) for which, tile in ((False, prefill), (True, decode))]
    stored_bytes = q.element_size() if given.kv == "model" else 1
    found = predict(step, parts[0], parts[1], given.rules, (q.shape[2], stored_bytes), rates)
    return "spread" if found.pays else "serial", found.reason


def _prefill(given: Given, chunks: Int64Array, tile: Tile, slots: int) -> Whole | Cut:
    """Tiles of the slices `chunks`; cut if they leave some of `slots` thread blocks without work."""
    tiles = row_tiles(given.step, tile.rows)
    tiles = tiles[np.isin(tiles[:, 0], chunks)]
    if len(tiles) * given.n_heads < slots:
        return Cut(_plan(given, tiles, tile, slots), tile, False)
    tiles = order_tiles(given.step, tiles, tile.rows, given.rules)
    work = _entries(tiles, count_rows(given.step, tiles, tile.rows), given.n_heads)
    return Whole(torch.from_numpy(work).to(given.slices.device), tile)


def _entries(tiles: Int32Array, counts: Int64Array, n_heads: int) -> Int32Array:
    """Work of whole tiles, the heads of a tile side by side as they lie in memory: int32 [M * HKV, 8]."""
    work = np.zeros((len(tiles) * n_heads, 8), dtype=np.int32)
    work[:, 0], work[:, 2], work[:, 3] = (np.repeat(x, n_heads) for x in (tiles[:, 0], tiles[:, 1], counts))
    work[:, 1] = np.tile(np.arange(n_heads), len(tiles))
    work[:, 5], work[:, 6], work[:, 7] = ALL_UNITS, -1, 1
    return work


def _plan(given: Given, tiles: Int32Array, tile: Tile, slots: int) -> SplitLists:
    heads, device = given.heads, given.slices.device
    n_layers, n_heads = heads.rule_of_head.shape
    lists = SplitLists.empty(n_layers, len(tiles), n_heads, slots, device)
    limits = heads.sink_tokens, heads.min_span_tokens
    inputs = given.slices, given.pinned, torch.from_numpy(tiles).to(device), heads.rules, heads.rule_of_head
    plan_splits(PlannerInput(*inputs, *limits), given.step.group, tile.rows, lists)
    return lists


def _tickets(
    given: Given, machine: Machine, device: torch.device, prefill: Whole | Cut | None, decode: Cut | None
) -> list[Tickets]:
    """Counters for all layers, set to 0 by each launch; interpreted programs go to the multiprocessors in turn."""
    counters = torch.empty(len(given.rules.rule_of_head), 2 + machine.n_sms, dtype=torch.int32, device=device)
    told = None
    if device.type != "cuda" and isinstance(prefill, Whole) and decode is not None:
        told = torch.arange(len(prefill.work) + decode.plan.work.shape[1], dtype=torch.int32) % machine.n_sms
    return [Tickets(row, told) for row in counters]


def _blocks(step: Step) -> torch.Tensor:
    """Slice and first token of what one program appends, int32 [blocks, 2]."""
    blocks = [(i, first) for i, n in enumerate(step.slices[:, 1].tolist()) for first in range(0, n, APPEND_TOKENS)]
    return torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2)
