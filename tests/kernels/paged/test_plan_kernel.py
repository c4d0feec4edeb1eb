"""The planner on the device writes what the numpy reference does, in Triton's interpreter."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from moa.kernels.paged import splits
from moa.kernels.paged.splits import HeadRules, Step


@pytest.fixture(scope="session")
def planner() -> ModuleType:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    return importlib.import_module("moa.kernels.paged.planner")


def given(planner: ModuleType, step: Step, heads: HeadRules, tiles: np.ndarray) -> object:
    arrays = (step.slices, step.pinned, tiles, heads.rules, heads.rule_of_head)
    return planner.PlannerInput(*map(torch.from_numpy, arrays), heads.sink_tokens, heads.min_span_tokens)


def run(planner: ModuleType, step: Step, heads: HeadRules, tiles: np.ndarray, rows: int, slots: int) -> tuple:
    lists = planner.SplitLists.empty(*[len(heads.rule_of_head), len(tiles), heads.rule_of_head.shape[1]], slots, "cpu")
    lists.work.fill_(-77)
    lists.items.fill_(-77)
    planner.plan_splits(given(planner, step, heads, tiles), step.group, rows, lists, block=32)
    assert lists.live.tolist() == (lists.work[:, :, 7] > 0).sum(1).tolist()
    return lists.work.numpy(), lists.items.numpy()


def compare(planner: ModuleType, step: Step, heads: HeadRules, tiles: np.ndarray, rows: int, slots: int) -> None:
    work, items = run(planner, step, heads, tiles, rows, slots)
    for layer in range(len(heads.rule_of_head)):
        wanted_work, wanted_items = splits.plan_splits(step, tiles, rows, heads, layer, slots)
        np.testing.assert_array_equal(items[layer], wanted_items)
        np.testing.assert_array_equal(work[layer], wanted_work)


@pytest.mark.parametrize("batch", range(8))
def test_decode_lists_equal_the_reference(batch: int, planner: ModuleType, steps: SimpleNamespace) -> None:
    """Eight steps each: decodes and draft tokens after up to a million cached ones, three layers."""
    rng = np.random.default_rng(batch)
    for _ in range(8):
        group, n = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        heads = steps.make_heads(rng, 3, int(rng.integers(1, 6)), sink=int(rng.choice([0, 3, 64, 100])))
        step = steps.make_step(rng, n, group, int(rng.integers(0, 16 // group + 1)), longest=1 << 20)
        compare(planner, step, heads, splits.decode_tiles(n), 16, int(rng.choice([1, 8, 40])))


@pytest.mark.parametrize("seed", range(5))
def test_lists_of_short_chunks_equal_the_reference(seed: int, planner: ModuleType, steps: SimpleNamespace) -> None:
    """Tiles of prefill chunks, cut when there are too few of them for the GPU."""
    rng = np.random.default_rng(seed)
    heads = steps.make_heads(rng, 2, 2)
    step = steps.make_step(rng, 2, int(rng.integers(1, 8)), 70)
    if len(tiles := splits.row_tiles(step, 64)):
        compare(planner, step, heads, tiles, 64, 50)


def test_a_list_for_a_whole_gpu_equals_the_reference(planner: ModuleType, steps: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    step = steps.make_step(rng, 37, 4, 2)
    compare(planner, step, steps.make_heads(rng, 1, 8), splits.decode_tiles(37), 16, 264)


def test_an_idle_step_leaves_empty_lists(planner: ModuleType, steps: SimpleNamespace) -> None:
    step = Step(np.zeros((3, 4), dtype=np.int32), np.zeros(3, dtype=np.int64), 4)
    heads = steps.make_heads(np.random.default_rng(0), 2, 2)
    work, items = run(planner, step, heads, splits.decode_tiles(3), 16, 8)
    assert (work == np.array(splits.NO_ITEM)).all()
    assert not items[:, :, 5].any()
    assert not items[:, :, 7].any()


def test_too_many_items_are_refused(planner: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"16384 items .* got 2049 x 8"):
        planner.SplitLists.empty(1, 2049, 8, 264, torch.device("cpu"))
