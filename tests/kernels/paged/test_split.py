"""Attention cut into splits equals attention uncut, and the merge equals its reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory
from moa.kernels.paged import backend, lists
from moa.kernels.paged.launch import Partials, attend_list, merge
from moa.kernels.paged.merge import merge_partials
from moa.kernels.paged.tiles import Tile

TILE = Tile(16, 64, 4, 1)


def items_of(work: torch.Tensor) -> torch.Tensor:
    """The items of a work list whose every item is cut in equally many splits, side by side."""
    count = int(work[0, 7])
    return torch.cat([torch.cat((row[:4], torch.tensor([0, 1 << 30]), row[6:])) for row in work[::count]]).view(-1, 8)


@settings(max_examples=6)
@given(
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True),
    rule=st.sampled_from([(0, 1.0), (30, 0.5), (70, 0.0)]),
    cached=st.sampled_from([0, 64, 150, 200]),
    learned=st.booleans(),
)
def test_split_equals_unsplit(
    lab: SimpleNamespace, paged: SimpleNamespace, cuts: list[int], rule: tuple[int, float], cached: int, learned: bool
) -> None:
    """Cuts fall anywhere, also beyond the last unit: such splits see nothing."""
    case = paged.Case(lab.make_rules([[rule]]), [(cached, 3)], group=2, learned=learned)
    whole, split = paged.build(case), paged.build(case)
    attend_list(whole, paged.work_of(case, 16), TILE)
    work = paged.work_of(case, 16, cuts)
    partials = Partials(
        *(backend._scratch((len(work), 16, *rest), torch.float32, split.q.device) for rest in ((16,), ()))
    )
    attend_list(split, work, TILE, partials)
    assert split.out.isnan().all()
    merge(split, items_of(work[:-1]), TILE, partials)
    paged.check(case, split, 1e-5)
    torch.testing.assert_close(split.out, whole.out, atol=1e-6, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(split.lse, whole.lse, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_merge_equals_its_reference(lab: SimpleNamespace, paged: SimpleNamespace, rows: int) -> None:
    """Three items: of one split, which is left alone, of two and of five; some partial results saw no key."""
    case = paged.Case(lab.make_rules([[(0, 1.0)] * 3]), [(0, rows)], group=1)
    call, generator = paged.build(case), torch.Generator().manual_seed(rows)
    partials = Partials(torch.full((7, 16, 16), torch.nan), torch.full((7, 16), torch.nan))
    partials.out[:, :rows] = torch.randn(7, rows, 16, generator=generator)
    partials.lse[:, :rows] = 9 * torch.randn(7, rows, generator=generator)
    partials.lse[3, :rows] = -torch.inf
    partials.out[3, :rows] = 0
    counts = ((-1, 1), (0, 2), (2, 5))
    items = [(0, head, 0, rows, 0, 9, slot, count) for head, (slot, count) in enumerate(counts)]
    merge(call, torch.tensor(items, dtype=torch.int32), TILE, partials)
    part = call.out[case.gap : case.gap + rows], call.lse[case.gap : case.gap + rows]
    assert all(x[:, 0].isnan().all() for x in part)
    for head, (slot, count) in list(enumerate(counts))[1:]:
        which = slice(slot, slot + count)
        out, lse = merge_partials(partials.out[which, :rows].double(), partials.lse[which, :rows].double())
        torch.testing.assert_close(part[0][:, head].double(), out, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(part[1][:, head].double(), lse * 0.6931471805599453, atol=1e-5, rtol=1e-5)


def test_parts_without_any_key_merge_to_nothing() -> None:
    out, lse = merge_partials(torch.zeros(3, 2, 4), torch.full((3, 2), -torch.inf))
    assert out.eq(0).all()
    assert lse.isneginf().all()


def test_long_decodes_are_planned_as_splits_and_right(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two decodes and a chunk in one step; one decode is long enough that the planner cuts it."""
    rules = lab.make_rules([[(0, 1.0)]])
    inputs = [lab.make_qkv(n, 1, 1, 16, i) for i, n in enumerate((522, 41, 70))]
    kv = new_memory("triton", rules)
    for i in range(3):
        kv.add(i)
    batch = Batch.pack([(0, 520, 0), (1, 40, 0)])
    attend(*(torch.cat((a[:520], b[:40])) for a, b in zip(inputs[0], inputs[1], strict=True)), kv, 0, batch)
    made = []
    plan = lists.plan_splits
    monkeypatch.setattr(lists, "plan_splits", lambda *args: (plan(*args), made.append(args[3]))[0])
    packed = [torch.cat((a[520:], b[40:], c)) for a, b, c in zip(*inputs, strict=True)]
    out, lse = attend(*packed, kv, 0, Batch.pack([(0, 2, 520), (1, 1, 40), (2, 70, 0)]), return_lse=True)
    assert made[0].items[0, :, 7].tolist() == [3, 1]
    for i, (a, b) in enumerate(((0, 2), (2, 3), (3, 73))):
        want = lab.oracle(rules, inputs[i])[-(b - a) :]
        torch.testing.assert_close(out[a:b].double(), want, atol=1e-5, rtol=1e-5)
    assert lse.isfinite().all()
