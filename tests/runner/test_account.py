"""The account says what memory really holds, at any length and chunk, and refuses what can never fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import ResourceError
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory
from moa.runner.account import Footprint, KVAccount
from moa.spans import BETA_ONE, SpanRules

LAYERS, HEADS, DIM = 2, 3, 16


@st.composite
def rules(draw: st.DrawFn) -> SpanRules:
    sink = draw(st.sampled_from([0, 3, 64, 70]))
    shape = (LAYERS, HEADS)
    numbers = st.lists(st.integers(-200, 300), min_size=6, max_size=6)
    betas = st.lists(st.sampled_from([0, BETA_ONE // 4, BETA_ONE // 3, BETA_ONE]), min_size=6, max_size=6)
    return SpanRules(
        alpha=np.array(draw(numbers), dtype=np.int64).reshape(shape),
        beta_fixed=np.array(draw(betas), dtype=np.int64).reshape(shape),
        sink_tokens=sink,
        min_span_tokens=sink + draw(st.sampled_from([1, 17, 64, 130])),
        length_mode=draw(st.sampled_from(["running", "pinned"])),
    )


def step(memory, count: int, position: int) -> int:
    """Run a chunk of sequence 0 through all layers; the most slots or tokens that were held meanwhile."""
    batch, most = Batch.pack([(0, count, position)]), 0
    for layer in range(LAYERS):
        q, k, v = (torch.randn(count, heads, DIM) for heads in (2 * HEADS, HEADS, HEADS))
        attend(q, k, v, memory, layer, batch)
        most = max(most, memory.kv_bytes)
    return most


@settings(max_examples=40)
@given(rules=rules(), chunks=st.lists(st.sampled_from([1, 1, 5, 63, 64, 65, 128, 150]), min_size=1, max_size=7))
def test_the_account_is_what_rows_of_tokens_hold(rules: SpanRules, chunks: list[int]) -> None:
    footprint, pinned = Footprint(rules), sum(chunks)
    with new_memory("torch", rules) as memory:
        memory.add(0, pinned)
        length = 0
        for count in chunks:
            step(memory, count, length)
            length += count
            held = sum(sum(memory.stored_tokens(0, layer)) for layer in range(LAYERS))
            assert footprint.held(np.array([length]), [pinned])[0] == held
            assert footprint.most(length, pinned) >= held


@settings(max_examples=40)
@given(rules=rules(), chunks=st.lists(st.sampled_from([1, 1, 5, 63, 64, 65, 128, 150]), min_size=1, max_size=7))
def test_the_account_is_what_pages_hold(rules: SpanRules, chunks: list[int]) -> None:
    pytest.importorskip("triton")
    footprint, pinned = Footprint(rules, page_tokens=64), sum(chunks)
    page_bytes = 2 * 64 * DIM * 4
    with new_memory("triton", rules) as memory:
        memory.add(0, pinned)
        length = most = 0
        for count in chunks:
            start, end = np.array([length]), np.array([length + count])
            batch = Batch.pack([(0, count, length)])
            arena, taken = memory.step(0, torch.zeros(count, HEADS, DIM), batch)  # pages are taken; no kernel runs
            assert memory.kv_bytes == footprint.during(start, end, [pinned])[0] * page_bytes
            if count <= 64:
                most = max(most, memory.kv_bytes // page_bytes)
            for layer in range(LAYERS):
                memory.finish(layer, arena, taken)
            length += count
            held = memory.kv_bytes // page_bytes
            assert footprint.held(end, [pinned])[0] == held
            assert footprint.most(length, pinned) >= max(held, most)


def test_native_windows_count() -> None:
    dense = SpanRules(np.zeros((2, 1), np.int64), np.full((2, 1), BETA_ONE), sink_tokens=0, min_span_tokens=1)
    footprint = Footprint(dense, (10, None))
    assert footprint.held(np.array([0, 7, 10, 50]), [None] * 4).tolist() == [0, 14, 20, 60]


def test_an_account_gives_and_takes() -> None:
    dense = SpanRules(np.zeros((1, 2), np.int64), np.full((1, 2), BETA_ONE), sink_tokens=0, min_span_tokens=1)
    account = KVAccount(Footprint(dense), 100)
    assert account.set(1, 60)
    assert not account.set(2, 41)
    assert account.set(2, 40)
    assert account.free_slots == 0
    assert account.set(1, 10)
    account.release(2)
    account.release(2)
    assert (account.used_slots, account.held(1), account.held(2), account.usage_ratio) == (10, 10, 0, 0.1)
    account.require_possible(10, 50)
    with pytest.raises(
        ResourceError, match=r"a prompt of 10 tokens that may grow to 51 .* for 102 tokens .* room for 100"
    ):
        account.require_possible(10, 51)
