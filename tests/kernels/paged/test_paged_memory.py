"""Page accounting: a page for every survivor, none for what no query can see, and all of them come back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import ResourceError, UsageError
from moa.kernels.batch import Batch
from moa.kernels.dispatch import new_memory
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.paged.page_table import NONE, Entries
from moa.spans import keep

PAIRS = st.tuples(st.sampled_from([-20, 0, 10, 70, 200]), st.sampled_from([0.0, 0.1, 0.5, 1.0]))


def run(kv: PagedMemory, parts: list[tuple[int, int]], layers: int, size: int = 8) -> None:
    """The account of a step without its kernels: (sequence, tokens) each, in all layers."""
    batch = Batch.pack([(i, n, kv.length(i)) for i, n in parts])
    k = torch.zeros(sum(n for _, n in parts), kv.rules.alpha.shape[1], size)
    for layer in range(layers):
        arena, step = kv.step(layer, k, batch)
        kv.finish(layer, arena, step)


def check_account(kv: PagedMemory) -> None:
    """Every page is free or in one entry; entries of held sequences fit what the last query sees; bytes add up."""
    (arena,) = kv.arenas
    table, pools = arena.table, {id(p): p for p in (arena.pool, arena.coded)}
    held = 0
    for pool in pools.values():
        columns = np.arange(table.entries.shape[2])
        mine = columns < table.sink_pages if pool is not arena.coded else columns >= table.sink_pages
        entries = table.entries if len(pools) == 1 else table.entries[:, :, mine]
        taken = entries[entries != NONE].tolist()
        assert sorted([*taken, *pool._free.tolist()]) == list(range(pool.pages))
        held += len(taken) * pool.form.page_bytes
    assert kv.kv_bytes == held
    assert kv.pool_bytes >= held
    for sequence in (i for i in kv.sequences if kv.length(i)):
        check_sequence(kv, table.entries[kv.state(sequence).slot], sequence)


def check_sequence(kv: PagedMemory, entries: np.ndarray, sequence: int) -> None:
    n_heads, sink = kv.rules.alpha.shape[1], kv.rules.sink_tokens
    for layer in range(len(kv.table.layers)):
        n = kv.length(sequence, layer)
        starts = kv.table.starts(n - 1, 1, kv.state(sequence).pinned_tokens)[:, 0] if n else None
        for head in range(n_heads):
            rule = kv.table.rule_of_head[layer, head]
            native = kv.table.native_window(rule) or 1 << 30
            needed = {j // 64 for j in range(n) if keep(n - 1, j, int(starts[rule]), sink) and n - 1 - j < native}
            held = set(np.flatnonzero(entries[layer * n_heads + head] != NONE).tolist())
            assert needed == held


@settings(max_examples=25)
@given(data=st.data())
def test_pages_are_those_that_the_next_queries_need(lab: SimpleNamespace, data: st.DataObject) -> None:
    sink = data.draw(st.sampled_from([0, 1, 64, 70]))
    mode = data.draw(st.sampled_from(["running", "pinned"]))
    pairs = [[data.draw(PAIRS) for _ in range(2)] for _ in range(2)]
    rules = lab.make_rules(pairs, sink, sink + data.draw(st.sampled_from([1, 90])), mode)
    native = [data.draw(st.sampled_from([None, None, 3, 100])) for _ in range(2)]
    kv = PagedMemory(rules, native, kv_dtype=data.draw(st.sampled_from([None, "int8"])))
    known = 0
    for _ in range(data.draw(st.integers(1, 8))):
        if len(kv.sequences) < 3:
            kv.add(known, data.draw(st.sampled_from([30, 300])))
            known += 1
        chosen = data.draw(st.lists(st.sampled_from(kv.sequences), min_size=1, unique=True))
        run(kv, [(i, data.draw(st.sampled_from([1, 1, 2, 63, 64, 130, 333]))) for i in chosen], 2)
        check_account(kv)
        if data.draw(st.booleans()):
            kv.remove(kv.sequences[0])
            check_account(kv)
    for i in kv.sequences:
        kv.remove(i)
    assert kv.kv_bytes == kv.pool_bytes == 0


def test_layers_may_run_at_their_own_pace(lab: SimpleNamespace) -> None:
    rules = lab.make_rules([[(100, 0.0)], [(0, 1.0)]])
    kv = PagedMemory(rules)
    kv.add(0)
    for layer in range(2):
        for at in range(0, 400, 100):
            arena, step = kv.step(layer, torch.zeros(100, 1, 8), Batch.pack([(0, 100, at)]))
            kv.finish(layer, arena, step)
    entries = kv.arenas[0].table.entries[0]
    assert (entries != NONE).sum(1).tolist() == [1 + 3, 7]  # sinks, and the window [304, 400); all of 400


def test_layers_of_other_sizes_have_pages_of_their_own(lab: SimpleNamespace) -> None:
    kv = PagedMemory(lab.make_rules([[(0, 1.0)], [(0, 1.0)]]))
    kv.add(0)
    for at in range(2):
        batch = Batch.pack([(0, 1, at)])
        for layer, size in enumerate((8, 16)):
            arena, step = kv.step(layer, torch.zeros(1, 1, size), batch)
            assert arena.form.size == size
            kv.finish(layer, arena, step)
    assert kv.kv_bytes == 2 * 64 * (8 + 16) * 4
    kv.remove(0)
    assert kv.kv_bytes == 0


def test_a_full_pool_refuses_with_numbers_and_changes_nothing(lab: SimpleNamespace) -> None:
    kv = PagedMemory(lab.make_rules([[(0, 1.0), (0, 1.0)]]), pages=5)
    kv.add(0)
    kv.add(1)
    run(kv, [(0, 100)], 1)
    before = kv.arenas[0].table.entries.copy()
    with pytest.raises(ResourceError, match="4 more pages of 64 tokens are needed, 1 of 5 are free"):
        run(kv, [(1, 100)], 1)
    assert kv.length(1) == 0
    assert (kv.arenas[0].table.entries[: len(before)] == before).all()
    check_account(kv)
    kv.remove(0)
    run(kv, [(1, 100)], 1)
    check_account(kv)


def test_a_quantised_pool_of_fixed_size_takes_no_more_than_a_plain_one(lab: SimpleNamespace) -> None:
    """Storage for 100 pages of codes at once, and for pages with sinks as they come."""
    rules, run_bytes = lab.make_rules([[(0, 1.0)]]), []
    for kv_dtype in (None, "int8"):
        kv = PagedMemory(rules, pages=100, kv_dtype=kv_dtype)
        kv.add(0)
        run(kv, [(0, 200)], 1, size=16)
        check_account(kv)
        run_bytes.append(kv.pool_bytes)
        for i in range(1, 90):
            kv.add(i)
            run(kv, [(i, 1)], 1, size=16)
        check_account(kv)
        with pytest.raises(ResourceError, match=r"are needed, .* of 100 are free"):
            run(kv, [(0, 64 * 101)], 1, size=16)
    assert run_bytes[0] == 100 * 2 * 64 * 16 * 4
    assert 100 * 2 * 64 * (16 + 4) < run_bytes[1] < run_bytes[0] / 2


@pytest.mark.parametrize("page", [9, -2])
@pytest.mark.parametrize("is_new", [False, True], ids=["changed", "whole table"])
def test_a_page_table_that_points_outside_is_refused_before_any_launch(
    lab: SimpleNamespace, page: int, is_new: bool
) -> None:
    kv, qkv = PagedMemory(lab.make_rules([[(0, 1.0), (0, 1.0)]]), pages=9), lab.make_qkv(71, 2, 2, 16, 0)
    kv.add(0)
    if not is_new:
        lab.run_steps(kv, [x[:70] for x in qkv], [70])
    table = kv.step(0, qkv[1][70:], Batch.pack([(0, 1, kv.length(0))]))[0].table
    right, at = table.entries.copy(), Entries(np.array([1]), np.array([0]))
    table.put(at, page)
    call = [x[70:] for x in qkv]
    with pytest.raises(
        ValueError, match=f"head 1 points to page {page} for tokens from 0 on, its pool has 9 pages; this"
    ):
        lab.run_steps(kv, call, [1])
    assert kv.length(0) == 70 * (not is_new)
    table.put(at, right[0, 1, 0])
    assert lab.run_steps(kv, call, [1]).isfinite().all()


@pytest.mark.parametrize(("sources", "coded"), [([1, 1, 0, 1], None), ([2], None), ([2, 0, 0], "int8")])
def test_selected_sequences_go_on_as_their_sources_would(
    lab: SimpleNamespace, sources: list[int], coded: str | None
) -> None:
    rules = lab.make_rules([[(0, 0.5)]], 0, 4)
    kv, inputs = PagedMemory(rules, kv_dtype=coded), [lab.make_qkv(80, 1, 1, 16, i) for i in range(3)]
    for i, qkv in enumerate(inputs):
        kv.add(i)
        lab.run_steps(kv, [x[:75] for x in qkv], [75], sequence=i)
    kv.select(sources)
    assert kv.sequences == tuple(range(len(sources)))
    check_account(kv)
    for i, source in enumerate(sources):
        out = lab.run_steps(kv, [x[75:] for x in inputs[source]], [5], sequence=i)
        error = 1e-5 if coded is None else 3e-2
        torch.testing.assert_close(out.double(), lab.oracle(rules, inputs[source])[75:], atol=error, rtol=error)
    for i in range(len(sources)):
        kv.remove(i)
    assert kv.kv_bytes == 0


def test_beams_that_do_not_fit_are_refused_before_anything_changes(lab: SimpleNamespace) -> None:
    """Of 5 pages, a sequence of 3 and one of 1: two of the second fit once the first is gone, two of the first do not."""
    kv = PagedMemory(lab.make_rules([[(0, 1.0)]]), pages=5)
    for i, tokens in enumerate((190, 50)):
        kv.add(i)
        run(kv, [(i, tokens)], 1)
    with pytest.raises(ResourceError, match="3 more pages of 64 tokens are needed, 1 of 5 are free"):
        kv.select([0, 1, 0])
    assert (kv.sequences, kv.length(0), kv.length(1)) == ((0, 1), 190, 50)
    check_account(kv)
    kv.select([1, 1, 1, 1, 1])
    assert [kv.length(i) for i in kv.sequences] == [50] * 5
    check_account(kv)


def test_a_copy_that_does_not_fit_is_refused_and_leaves_nothing(lab: SimpleNamespace) -> None:
    kv = PagedMemory(lab.make_rules([[(0, 1.0)]]), pages=5)
    kv.add(0)
    run(kv, [(0, 190)], 1)
    for _ in range(3):  # a slot that stayed taken would show
        with pytest.raises(ResourceError, match="3 more pages of 64 tokens are needed, 2 of 5 are free"):
            kv.copy(0, 1)
    assert (kv.sequences, kv._n_slots, len(kv._free_slots)) == ((0,), 2, 1)
    check_account(kv)
    kv.add(1)
    run(kv, [(1, 100)], 1)
    check_account(kv)


def test_memory_says_what_it_cannot_do(lab: SimpleNamespace) -> None:
    rules = lab.make_rules([[(0, 1.0)]])
    with pytest.raises(UsageError, match="kv_dtype must be one of int8, fp8 or None, got 'int4'"):
        PagedMemory(rules, kv_dtype="int4")
    kv = new_memory("triton", rules)
    kv.add(0)
    with pytest.raises(ValueError, match=r"wanted float32, bfloat16 or float16, got torch\.float64"):
        lab.run_steps(kv, lab.make_qkv(1, 1, 1, 16, 0, torch.float64), [1])
    with pytest.raises(ValueError, match="head_dim up to 256, got 512"):
        lab.run_steps(kv, lab.make_qkv(1, 1, 1, 512, 0), [1])
    assert kv.length(0) == 0


def test_fresh_memory_is_of_the_same_kind(lab: SimpleNamespace) -> None:
    kv = PagedMemory(lab.make_rules([[(0, 1.0)]]), pages=7, kv_dtype="int8")
    other = kv.fresh()
    assert (other.pages, other.kv_dtype, other.table) == (7, "int8", kv.table)
    assert other.sequences == ()
