"""What is kept of an unfinished profile comes back bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from moa.profile.sums import Sums

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.integers(1, 99), st.lists(NUMBERS, min_size=1, max_size=9), st.sets(st.sampled_from(["torch", "triton"])))
def test_a_round_trip_changes_no_bit(texts, numbers, backends) -> None:
    sums = Sums(texts, tuple(sorted(backends)), np.array(numbers).reshape(1, 1, 1, -1))
    found = Sums.from_bytes(sums.to_bytes())
    assert (found.texts, found.backends) == (sums.texts, sums.backends)
    assert found.losses.tobytes() == sums.losses.tobytes()
    found.losses[:] = 0  # it can be written to


GOOD = Sums(1, ("torch",), np.ones((1, 1, 1, 1)))
HEADER = {"texts": "1", "backends": "[]"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        GOOD.to_bytes()[:-1],
        Sums(0, (), GOOD.losses).to_bytes(),
        Sums(1, (), GOOD.losses[0]).to_bytes(),
        Sums(1, (), np.full((1, 1, 1, 1), np.nan)).to_bytes(),
        safetensors.numpy.save({"losses": np.ones((1, 1, 1, 1), dtype=np.float32)}, HEADER),
        safetensors.numpy.save({"losses": GOOD.losses}),
        safetensors.numpy.save({"losses": GOOD.losses}, {**HEADER, "texts": "x"}),
        safetensors.numpy.save({"losses": GOOD.losses}, {**HEADER, "backends": "3"}),
        safetensors.numpy.save({"other": GOOD.losses}, HEADER),
    ],
)
def test_other_bytes_are_refused(data) -> None:
    with pytest.raises(ValueError, match=r"."):
        Sums.from_bytes(data)
