"""Addresses take 64 bits: the same results where pages, rows of tables and packed tokens lie beyond 2**31 elements."""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moa.kernels.paged.launch import Call, Partials, Pools, append, attend_list, merge
from moa.kernels.paged.quantise import quantise
from moa.kernels.paged.tiles import Tile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="address space is reserved by Linux's MAP_NORESERVE")
FAR = 1 << 31
MAP_NORESERVE = 0x4000  # Python 3.11 has no name for it


def reserved(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, first: int = 0) -> torch.Tensor:
    """A view into address space of which only what is touched gets memory."""
    count = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    room = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(room, dtype=dtype).as_strided(shape, strides, first)


def far_tokens(x: torch.Tensor, last: int) -> torch.Tensor:
    """A copy whose tokens from `last` on lie beyond 2**31 elements, by a stride that fits in 32 bits."""
    stride = FAR // last + 16
    far = reserved(tuple(x.shape), (stride, *x.stride()[1:]), x.dtype)
    far.copy_(x)
    return far


def far_pages(x: torch.Tensor, page: int | None = None) -> torch.Tensor:
    """A copy whose pages all lie beyond 2**31 elements, of a pool whose pages have `page` elements, or as many as here."""
    first = FAR // (page or x[0].numel()) + 1
    far = reserved((first + x.shape[0], *x.shape[1:]), x.stride(), x.dtype)
    far[first:].copy_(x)
    return far


def far_slots(x: torch.Tensor, pages: int) -> torch.Tensor:
    """A page table whose slots, two further on, lie beyond 2**31 entries by a stride that fits in 32 bits; as do its pages."""
    far = reserved((x.shape[0] + 2, *x.shape[1:]), (FAR // 2, *x.stride()[1:]), x.dtype)
    far[2:].copy_(x + pages)
    return far


def moved(call: Call) -> Call:
    """The same call with everything far away."""
    pages, last = FAR // call.pools.keys[0].numel() + 1, int(call.slices[-1, 0])
    return replace(
        call,
        **{name: far_tokens(getattr(call, name), last) for name in ("q", "k", "v", "out")},
        pools=Pools(far_pages(call.pools.keys), far_pages(call.pools.values)),
        table=far_slots(call.table, pages),
        slices=call.slices + torch.tensor([0, 0, 0, 2], dtype=torch.int32),
    )


def test_attention_far_away_equals_attention_nearby(lab: SimpleNamespace, paged: SimpleNamespace) -> None:
    case = paged.Case(lab.make_rules([[(70, 0.3)]]), [(70, 3), (130, 2)], size=64, dtype=torch.float16)
    near = paged.build(case)
    far = moved(near)
    for call in (near, far):
        attend_list(call, paged.work_of(case, 16), Tile(16, 64, 4, 1))
    assert torch.equal(far.out.nan_to_num(9), near.out.nan_to_num(9))
    paged.check(case, near, 4e-3)


def quantised(call: Call) -> Call:
    """The same pages as codes too, NaN where no token lies."""
    keys, values = (quantise(x.nan_to_num(), torch.int8) for x in (call.pools.keys, call.pools.values))
    for scale, x in ((keys[1], call.pools.keys), (values[1], call.pools.values)):
        scale[x[..., 0].isnan()] = torch.nan
    return replace(call, pools=replace(call.pools, codes=(keys[0], values[0], keys[1], values[1])))


def test_quantised_pages_far_away_equal_those_nearby(lab: SimpleNamespace, paged: SimpleNamespace) -> None:
    case = paged.Case(lab.make_rules([[(70, 0.3)]]), [(70, 3), (130, 2)], size=64, dtype=torch.float16)
    near = quantised(paged.build(case))
    far = moved(near)
    codes = near.pools.codes
    far = replace(far, pools=replace(far.pools, codes=tuple(far_pages(x, near.pools.keys[0].numel()) for x in codes)))
    blocks = torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)
    for call in (near, far):
        attend_list(call, paged.work_of(case, 16), Tile(16, 64, 4, 1))
        append(call, blocks)
    assert torch.equal(far.out.nan_to_num(9), near.out.nan_to_num(9))
    paged.check(case, near, 0.1)
    for a, b in zip(codes, far.pools.codes, strict=True):
        assert torch.equal(a.nan_to_num(9), b[-len(a) :].nan_to_num(9))


def test_partial_results_far_away_equal_those_nearby(lab: SimpleNamespace, paged: SimpleNamespace) -> None:
    case = paged.Case(lab.make_rules([[(70, 0.3)]]), [(130, 2)], size=64, dtype=torch.float16)
    calls, first = [], FAR // (16 * 64) + 1
    for at in (0, first):
        call, work = paged.build(case), paged.work_of(case, 16, [1])
        work[:-1, 6] += at
        shape = at + len(work), 16, 64
        partials = Partials(
            reserved(shape, (16 * 64, 64, 1), torch.float32), reserved(shape[:2], (16, 1), torch.float32)
        )
        attend_list(call, work, Tile(16, 64, 4, 1), partials)
        merge(call, work[:-1:2].contiguous(), Tile(16, 64, 4, 1), partials)
        calls.append(call)
    paged.check(case, calls[0], 4e-3)
    assert torch.equal(calls[0].out.nan_to_num(9), calls[1].out.nan_to_num(9))


def test_append_far_away_equals_append_nearby(lab: SimpleNamespace, paged: SimpleNamespace) -> None:
    case = paged.Case(lab.make_rules([[(70, 0.3)]]), [(65, 3), (130, 2)], size=64, dtype=torch.float16)
    near = paged.build(case)
    far = moved(near)
    blocks = torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)
    for call in (near, far):
        append(call, blocks)
    count = near.pools.keys.shape[0]
    for a, b in ((near.pools.keys, far.pools.keys), (near.pools.values, far.pools.values)):
        assert torch.equal(a.nan_to_num(9), b[-count:].nan_to_num(9))
    page = near.table[1, 0, 131 // 64]
    assert torch.equal(near.pools.values[page, 131 % 64], near.v[near.slices[1, 0] + 1, 0])
