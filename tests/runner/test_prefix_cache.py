"""The prefix cache finds the longest state that a text begins with, and never one of another text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.runner.prefix_cache import PrefixCache

BLOCK = 4
# Few letters, so that texts begin alike, and differ within a block as well as at its end.
TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=12)


@given(kept=TEXTS, asked=TEXTS)
def test_the_longest_state_that_a_text_begins_with_is_found(kept: list[list[int]], asked: list[list[int]]) -> None:
    cache, held = PrefixCache("plan", BLOCK, lambda holder: None), {}
    for holder, tokens in enumerate(kept):
        is_new = len(tokens) >= BLOCK and tokens not in held.values()
        assert cache.keep(holder, tokens, None) is is_new
        if is_new:
            held[holder] = tokens
    for tokens in asked:
        fitting = [h for h, state in held.items() if len(state) < len(tokens) and tokens[: len(state)] == state]
        found = cache.find(tokens, None).kept
        assert (found is None) is (not fitting)
        if found is not None:
            assert found.holder in fitting
            assert found.length == max(len(held[h]) for h in fitting)
        assert cache.find(tokens, 7).kept is None, "another pinned length is another text"
    assert len(cache) == len(held)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=2, max_size=8))
def test_a_state_is_left_where_an_earlier_text_went_the_same_way(texts: list[list[int]]) -> None:
    cache = PrefixCache("plan", BLOCK, lambda holder: None)
    for i, tokens in enumerate(texts):
        alike = [next((j for j, (a, b) in enumerate(zip(tokens, old, strict=False)) if a != b), min(len(tokens), len(old)))
                 for old in texts[:i]]  # fmt: skip
        shared = min(max(alike, default=0), len(tokens) - 1) // BLOCK * BLOCK
        assert cache.find(tokens, None).leave_at == (shared or None)


def test_what_was_not_used_for_longest_goes_first() -> None:
    gone: list[int] = []
    cache = PrefixCache("plan", BLOCK, gone.append)
    for holder in range(3):
        cache.keep(holder, [holder] * 5, None)
    cache.find([0] * 8, None)
    while cache.drop_oldest():
        pass
    assert gone == [1, 2, 0]
    assert cache.find([0] * 8, None).kept is None
    assert cache.hit_ratio == pytest.approx(5 / 16)
