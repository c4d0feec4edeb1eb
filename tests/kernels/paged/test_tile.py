"""The tile over fresh keys and pages against the float64 reference, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.kernels.paged.launch import Call, attend_list
from moa.kernels.paged.tiles import Tile

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAIRS = st.tuples(st.sampled_from([-20, 0, 10, 70]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
CACHED, TOKENS = st.sampled_from([0, 0, 1, 5, 63, 64, 65, 128, 150]), st.sampled_from([1, 1, 3, 17, 64, 70])


@st.composite
def cases(draw: st.DrawFn, lab: SimpleNamespace, paged: SimpleNamespace) -> SimpleNamespace:
    """One or two sequences under any rules."""
    sink = draw(st.sampled_from([0, 1, 4, 64, 70]))
    mode = draw(st.sampled_from(["running", "pinned"]))
    sequences = [(draw(CACHED), draw(TOKENS)) for _ in range(draw(st.integers(1, 2)))]
    lengths = [draw(st.sampled_from([sum(n), sum(n) // 2 + 1, 2 * sum(n)])) for n in sequences]
    return paged.Case(
        lab.make_rules([[draw(PAIRS)]], sink, sink + draw(st.sampled_from([1, 2, 30])), mode),
        sequences,
        group=draw(st.sampled_from([1, 2, 3])),
        native=draw(st.sampled_from([None, None, 1, 5, 40, 100])),
        pinned=lengths if mode == "pinned" else None,
        softcap=draw(st.sampled_from([None, 1.0, 30.0])),
        learned=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=25)
@given(data=st.data())
def test_equals_the_reference(lab: SimpleNamespace, paged: SimpleNamespace, data: st.DataObject) -> None:
    case = data.draw(cases(lab, paged))
    call = paged.build(case)
    rows = data.draw(st.sampled_from([16, 64])) if max(n for _, n in case.sequences) < 64 else 128
    attend_list(call, paged.work_of(case, rows), Tile(rows, data.draw(st.sampled_from([32, 64])), 4, 1))
    paged.check(case, call, 1e-5)


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_head_dims_and_dtypes(lab: SimpleNamespace, paged: SimpleNamespace, size: int, dtype: torch.dtype) -> None:
    case = paged.Case(lab.make_rules([[(20, 0.3)]]), [(70, 5)], group=2, size=size, dtype=dtype)
    call = paged.build(case)
    attend_list(call, paged.work_of(case, 16), Tile(16, 64, 4, 1), short=True)
    assert call.out.dtype == dtype
    paged.check(case, call, TOLERANCE[dtype])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_any_number_of_query_heads_per_kv_head(lab: SimpleNamespace, paged: SimpleNamespace, group: int) -> None:
    case = paged.Case(lab.make_rules([[(0, 0.4), (9, 0.0)]]), [(66, 3), (0, 7)], group=group, learned=True)
    call = paged.build(case)
    attend_list(call, paged.work_of(case, 16), Tile(16, 64, 4, 1))
    paged.check(case, call, 1e-5)


def longer(call: Call) -> Call:
    return replace(call, heads=replace(call.heads, rules=call.heads.rules + torch.tensor([1, 0, 0])))


def shorter(call: Call) -> Call:
    return replace(call, heads=replace(call.heads, rules=call.heads.rules - torch.tensor([1, 0, 0])))


def without_a_cached_key(call: Call) -> Call:
    """As if position 110 were masked: its score is far below all others."""
    call.pools.keys[call.table[0, 0, 110 // 64], 110 % 64] = -50 * call.q[call.slices[0, 0], 0].sign()
    return call


def without_a_fresh_key(call: Call) -> Call:
    at = call.slices[0, 0]
    call.k[at, 0] = -50 * call.q[at, 0].sign()
    return call


def with_a_shifted_position(call: Call) -> Call:
    return replace(call, slices=call.slices + torch.tensor([[0, 0, -1, 0]], dtype=torch.int32))


@pytest.mark.parametrize(
    "change", [longer, shorter, without_a_cached_key, without_a_fresh_key, with_a_shifted_position]
)
def test_one_key_too_few_or_too_many_is_seen(
    lab: SimpleNamespace, paged: SimpleNamespace, change: Callable[[Call], Call]
) -> None:
    """The comparison has teeth: any change in the keys that are seen moves the result far beyond its tolerance."""
    case = paged.Case(lab.make_rules([[(40, 0.0)]]), [(130, 2)], group=1)
    call = change(paged.build(case))
    attend_list(call, paged.work_of(case, 16), Tile(16, 64, 4, 1))
    with pytest.raises(AssertionError):
        paged.check(case, call, 1e-2)
