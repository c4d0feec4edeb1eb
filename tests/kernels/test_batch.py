"""A packed step and its slices: each gets its own part of a tensor, wherever it lies, and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moa.kernels.batch import Batch, Slice


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6), st.integers(0, 3), st.randoms()
)
def test_cut_gives_every_slice_its_tokens(parts, padding, random) -> None:
    slices, end = [], 0
    for sequence, (gap, tokens) in enumerate(parts):
        slices.append(Slice(sequence, end + gap, tokens, 0))
        end += gap + tokens
    random.shuffle(slices)
    batch = Batch(tuple(slices))
    packed = torch.arange(2 * (end + padding)).view(2, -1)
    for x, dim in ((packed, 1), (packed.T, 0)):
        cuts = batch.cut(x, dim)
        assert [cut.tolist() for cut in cuts] == [x.narrow(dim, s.offset, s.tokens).tolist() for s in slices]
        assert all(cut.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for cut in cuts)
    joined = batch.join([cut + 1 for cut in batch.cut(packed.T)], packed.T, 0)
    inside = torch.zeros_like(packed.T)
    for item in slices:
        inside[item.offset : item.offset + item.tokens] = packed.T[item.offset : item.offset + item.tokens] + 1
    assert torch.equal(joined, inside)
    assert batch.are_single == all(tokens == 1 for _, tokens in parts)
