"""Splits of work: every unit that some row sees once, within the capacity, longest first, and a balanced load."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moa.kernels.paged import splits
from moa.kernels.paged.splits import HeadRules, Item, Step
from moa.spans import BETA_ONE, MAX_TOKENS, SpanRules, keep

ROWS = 16


def visited(step: Step, tile: tuple[int, int], rows: int, heads: HeadRules, rule: int) -> int:
    """Units by definition: pages of the cache, and blocks of the fresh keys, that hold a key which the first row's rule
    keeps and which is not after the last row."""
    (_, tokens, cached, _), pinned = step.slices[tile[0]].tolist(), int(step.pinned[tile[0]])
    count = min(rows, tokens * step.group - tile[1])
    if count <= 0:
        return 0
    first = cached + tile[1] // step.group
    last = cached + (tile[1] + count - 1) // step.group
    alpha, beta, native = heads.rules[rule].tolist()
    mode = "pinned" if pinned else "running"
    spans = SpanRules(np.array([[alpha]]), np.array([[beta]]), heads.sink_tokens, heads.min_span_tokens, mode)
    start = int(spans.window_start(first, pinned or None)[0, 0])
    seen = [j for j in range(last + 1) if keep(max(first, j), j, start, heads.sink_tokens) and first - j < native]
    return len({j // 64 for j in seen if j < cached}) + len({(j - cached) // 64 for j in seen if j >= cached})


@pytest.mark.parametrize("seed", range(60))
def test_units_are_what_rows_see(seed: int, steps: SimpleNamespace) -> None:
    rng = np.random.default_rng(seed)
    heads = steps.make_heads(rng, 1, 1, sink=int(rng.choice([0, 1, 4, 63, 64, 65, 128])))
    step = steps.make_step(rng, 3, group=int(rng.integers(1, 8)), most_tokens=int(rng.choice([1, 3, 200])), longest=900)
    tiles = np.concatenate((splits.row_tiles(step, 32), splits.decode_tiles(3)))
    units = splits.count_units(step, tiles, 32, heads)
    for i, tile in enumerate(tiles.tolist()):
        for rule in range(len(heads.rules)):
            assert units[i, rule] == visited(step, tuple(tile), 32, heads, rule)


def check(work: np.ndarray, items: np.ndarray, n_items: int, slots: int) -> None:
    """Each item's units are covered once by contiguous splits; slots of partial results are distinct."""
    assert len(work) == splits.plan_capacity(n_items, slots)
    live = [Item(*row) for row in work.tolist() if row[7]]
    assert work[len(live) :].tolist() == [list(splits.NO_ITEM)] * (len(work) - len(live))
    parts: dict[tuple[int, ...], list[Item]] = {}
    for split in live:
        assert split.unit_to > split.unit_from
        parts.setdefault((split.slice, split.kv_head, split.row_from), []).append(split)
    assert len(parts) == sum(1 for row in items.tolist() if row[5])
    for row in items.tolist():
        item = Item(*row)
        found = sorted(parts.get((item.slice, item.kv_head, item.row_from), []), key=lambda split: split.unit_from)
        assert len(found) == item.n_splits
        edges = [split.unit_from for split in found] + [item.unit_to]
        assert edges[0] == 0
        assert [split.unit_to for split in found] == edges[1:]
        assert {(split.row_count, split.n_splits) for split in found} <= {(item.row_count, item.n_splits)}
        widths = np.diff(edges)
        assert not len(widths) or widths.max() - widths.min() <= 1
        wanted = [-1] if item.n_splits == 1 else [item.slot + j for j in range(item.n_splits)]
        assert [split.slot for split in found] == wanted[: item.n_splits]
    used = [split.slot for split in live if split.slot >= 0]
    assert sorted(used) == list(range(len(used)))


@pytest.mark.parametrize("batch", range(30))
def test_random_work_lists_cover_every_unit_once(batch: int, steps: SimpleNamespace) -> None:
    """A hundred lists each, of decodes and draft tokens; with dense heads, tiny windows, and slices without tokens."""
    rng = np.random.default_rng(batch)
    for _ in range(100):
        group, n = int(rng.integers(1, 9)), int(rng.integers(1, 24))
        heads = steps.make_heads(rng, 1, int(rng.integers(1, 9)))
        step = steps.make_step(rng, n, group, int(rng.integers(0, ROWS // group + 1)))
        slots = int(rng.choice([1, 8, 108, 132, 264]))
        work, items = splits.plan_splits(step, splits.decode_tiles(n), ROWS, heads, 0, slots)
        check(work, items, n * heads.rule_of_head.shape[1], slots)
        widths = (work[:, 5] - work[:, 4])[work[:, 7] > 0]
        if len(widths):
            chunk = splits.chunk_units(items[:, 5].astype(np.int64), len(work))
            assert widths.max() <= chunk
            # Longest first, but for what one bucket and an uneven share hide.
            assert (widths[1:] <= np.minimum.accumulate(widths)[:-1] + chunk / splits.BUCKETS + 1).all()


def test_the_chunk_is_the_smallest_that_fits(steps: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        units = np.floor(2 ** rng.uniform(0, 11, int(rng.integers(1, 50)))).astype(np.int64) * (rng.random() < 0.9)
        capacity = splits.plan_capacity(len(units), int(rng.choice([8, 132])))
        chunk = splits.chunk_units(units, capacity)
        assert (-(-units // chunk)).sum() <= capacity
        assert chunk == 4 or (-(-units // (chunk - 1))).sum() > capacity


# A model of launches, not a measurement: a thread block waits 1.5 us, then streams its units; those that stream share the
# bandwidth, none gets more than twice a fair share. After splits comes a merge of 4 us. One unit is K and V of 64 tokens,
# D 128, bfloat16.
BANDWIDTH, LATENCY_S, MERGE_S, UNIT_BYTES, SLOTS = 4.3e12, 1.5e-6, 4e-6, 2 * 64 * 128 * 2, 132 * 2


def makespan_s(widths: list[int]) -> float:
    """Time to stream splits of so many units, launched in this order."""
    queue = [width * UNIT_BYTES for width in widths]
    waiting = [(LATENCY_S, size) for size in queue[:SLOTS]]
    heapq.heapify(waiting)
    active: list[float] = []
    i, now, served = len(waiting), 0.0, 0.0  # `served`: bytes that every active split has streamed
    while active or waiting:
        rate = min(2 * BANDWIDTH / SLOTS, BANDWIDTH / len(active)) if active else 1.0
        finish = now + (active[0] - served) / rate if active else np.inf
        ready = waiting[0][0] if waiting else np.inf
        if finish <= ready:
            now, served = finish, heapq.heappop(active)
            if i < len(queue):
                heapq.heappush(waiting, (now + LATENCY_S, queue[i]))
                i += 1
        else:
            served, now = served + (rate * (ready - now) if active else 0.0), ready
            heapq.heappush(active, served + heapq.heappop(waiting)[1])
    return now


def planned(step: Step, heads: HeadRules, layer: int) -> list[int]:
    tiles = splits.decode_tiles(len(step.slices))
    work, _ = splits.plan_splits(step, tiles, ROWS, heads, layer, SLOTS)
    return [int(row[5] - row[4]) for row in work if row[7]]


def uniform(units: np.ndarray) -> list[int]:
    """The same number of splits for every head and sequence, as FlexDecoding and FSA have it."""
    n = max(1, min(-(-2 * SLOTS // len(units)), int(units.max()) // 4))
    return [len(part) for size in units for part in np.array_split(np.arange(size), min(n, size))]


def efficiencies(lengths: list[int], group: int, heads: HeadRules) -> tuple[float, float, float]:
    """Share of the bandwidth that a decode step reaches over all layers: this planner, uniform splits, no splits."""
    slices = np.array([[i, 1, n - 1, i] for i, n in enumerate(lengths)], dtype=np.int32)
    step = Step(slices, np.zeros(len(lengths), dtype=np.int64), group)
    seconds, ideal = np.zeros(3), 0.0
    by_rule = splits.count_units(step, splits.decode_tiles(len(lengths)), ROWS, heads)
    for layer, rule in enumerate(heads.rule_of_head):
        units = by_rule[:, rule].reshape(-1)
        lists = planned(step, heads, layer), uniform(units), units.tolist()
        seconds += [makespan_s(widths) + MERGE_S * (len(widths) > len(units)) for widths in lists]
        ideal += units.sum() * UNIT_BYTES / BANDWIDTH
    ours, even, none = ideal / seconds
    return float(ours), float(even), float(none)


def published(path: Path, group: int, layers: int = 4) -> HeadRules:
    """A published plan's first query head of each KV head, a few layers of it."""
    plan = json.loads(path.read_text())
    pairs = np.stack([np.array(plan[name])[:, ::group] for name in ("alphas", "betas")], -1)
    return as_heads(pairs[:: len(pairs) // layers])


def as_heads(pairs: np.ndarray) -> HeadRules:
    """Rules of (alpha, beta) [L, HKV, 2]."""
    distinct, rule_of = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
    rules = [(int(a), round(b * BETA_ONE), MAX_TOKENS) for a, b in distinct]
    return HeadRules(np.array(rules, dtype=np.int64), rule_of.reshape(pairs.shape[:2]).astype(np.int32), 64, 128)


def two_rules(seed: int, layers: int, kv_heads: int) -> HeadRules:
    """Two rules per layer, a window and a share of the length, as published plans have."""
    rng = np.random.default_rng(seed)
    near, far = rng.choice([512, 1024, 2048], layers), rng.choice([0.375, 0.5, 0.75, 1.0], layers)
    is_far = rng.random((layers, kv_heads, 1)) < 0.5
    return as_heads(np.where(is_far, np.stack((0 * far, far), -1)[:, None], np.stack((near, 0 * far), -1)[:, None]))


RAGGED = np.floor(2 ** np.random.default_rng(0).uniform(9, 17, 32)).astype(int).tolist()
# (lengths, G, KV heads, share of the bandwidth in the model: ours, uniform splits, no splits). Short caches are bound by
# latency; from 256 MB per layer on the share is what balance leaves.
SYNTHETIC = {
    "GQA, one of 32k": ([32768], 4, 8, 0.472, 0.409, 0.024),
    "GQA, 16 of 32k": ([32768] * 16, 4, 8, 0.917, 0.798, 0.377),
    "MHA, one of 32k": ([32768], 1, 32, 0.791, 0.690, 0.118),
    "MHA, 4 of 128k": ([131072] * 4, 1, 32, 0.981, 0.905, 0.436),
    "GQA, ragged 8": (RAGGED[:8], 4, 8, 0.817, 0.434, 0.059),
    "GQA, ragged 32": (RAGGED, 4, 8, 0.892, 0.425, 0.165),
}
VICUNA, LLAMA = "lmsys--vicuna-7b-v1.5-16k.json", "gradientai--Llama-3-8B-Instruct-262k.json"
PUBLISHED = {
    "Vicuna, one of 32k": ([32768], 1, VICUNA, 0.917, 0.819, 0.164),
    "Vicuna, 4 of 128k": ([131072] * 4, 1, VICUNA, 0.962, 0.889, 0.658),
    "Llama-3-8B, 16 of 32k": ([32768] * 16, 4, LLAMA, 0.973, 0.930, 0.679),
    "Llama-3-8B, ragged 8": (RAGGED[:8], 4, LLAMA, 0.945, 0.689, 0.100),
    "Llama-3-8B, ragged 32": (RAGGED, 4, LLAMA, 0.932, 0.625, 0.285),
}


@pytest.mark.parametrize("case", SYNTHETIC)
def test_load_is_balanced(case: str) -> None:
    lengths, group, kv_heads, *shares = SYNTHETIC[case]
    found = efficiencies(lengths, group, two_rules(0, 4, kv_heads))
    assert found == pytest.approx(shares, abs=0.002)
    assert found[0] > max(found[1:]) + 0.05


@pytest.mark.parametrize("case", PUBLISHED)
def test_load_of_published_plans_is_balanced(case: str, reference_data: Path) -> None:
    lengths, group, name, *shares = PUBLISHED[case]
    found = efficiencies(lengths, group, published(reference_data / "plans" / name, group))
    assert found == pytest.approx(shares, abs=0.002)
    assert found[0] > max(found[1:]) + 0.04


def greedy_load(costs: np.ndarray, slots: int) -> float:
    """The longest-running slot over the mean, when each slot takes the next tile as it becomes free."""
    ends = [0.0] * slots
    for cost in costs.tolist():
        heapq.heappush(ends, heapq.heappop(ends) + cost)
    return max(ends) / (sum(ends) / slots)


@pytest.mark.parametrize(
    ("lengths", "most"), [([4096], 1.06), ([32768], 1.01), ([700, 16384, 64, 3000], 1.02), ([2048] * 5, 1.06)]
)
def test_tiles_go_longest_first(lengths: list[int], most: float) -> None:
    """Launch order of prefill tiles, all KV heads of a tile side by side: never worse than the order of the rows."""
    heads = two_rules(1, 4, 8)
    slices = np.array([[sum(lengths[:i]), n, 0, i] for i, n in enumerate(lengths)], dtype=np.int32)
    step = Step(slices, np.zeros(len(lengths), dtype=np.int64), 4)
    tiles = splits.row_tiles(step, 128)
    ordered = splits.order_tiles(step, tiles, 128, heads)
    assert sorted(ordered.tolist()) == sorted(tiles.tolist())
    for rule in heads.rule_of_head:
        loads = [
            greedy_load((splits.count_units(step, order, 128, heads)[:, rule] + 2).reshape(-1), 132)
            for order in (ordered, tiles)
        ]
        assert loads[0] <= min(loads[1], most)
