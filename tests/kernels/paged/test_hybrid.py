"""One launch of prefill tiles and decodes: every entry runs once, with the results of separate launches bit for bit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moa.kernels.paged import splits
from moa.kernels.paged.hybrid import HybridWork, Tickets, attend_hybrid
from moa.kernels.paged.hybrid_kernel import choose, draw
from moa.kernels.paged.launch import Call, Partials, attend_list
from moa.kernels.paged.predict import RATES, Rates, predict, rates_of
from moa.kernels.paged.splits import HeadRules, Step
from moa.kernels.paged.tiles import Tile
from moa.spans import BETA_ONE, MAX_TOKENS


@triton.jit
def pick_kernel(OUT, TICKETS, SM_OF, n_sms, n_prefill, n_decode, BY_TICKET: tl.constexpr):
    pid = tl.program_id(0)
    if BY_TICKET:
        index, is_decode, is_there = draw(tl.load(SM_OF + pid), n_sms, TICKETS, n_prefill, n_decode)
    else:
        index, is_decode, is_there = choose(pid, n_prefill, n_decode)
    tl.store(OUT + pid * 2, tl.where(is_there, index, -1))
    tl.store(OUT + pid * 2 + 1, is_decode.to(tl.int32))


def picks(n_prefill: int, n_decode: int, spare: int, sm_of: list[int] | None) -> list[tuple[int, int]]:
    """(entry or -1, whether it is a decode) of each program."""
    programs = n_prefill + n_decode + spare
    out = torch.full((programs, 2), -7, dtype=torch.int32)
    places = torch.tensor(sm_of or [0], dtype=torch.int32)
    tickets = torch.zeros(2 + int(places.max()) + 1, dtype=torch.int32)
    n_sms = len(tickets) - 2
    pick_kernel[programs,](out, tickets, places, n_sms, n_prefill, n_decode, BY_TICKET=sm_of is not None)
    return [tuple(row) for row in out.tolist()]


SIZES = [(0, 0), (5, 0), (0, 5), (1, 1), (7, 3), (3, 17), (30, 2)]
PLACES = {
    "by place": lambda rng, n: None,
    "tickets of one multiprocessor": lambda rng, n: [0] * n,
    "tickets in turn": lambda rng, n: [i % 4 for i in range(n)],
    "tickets at random": lambda rng, n: rng.integers(0, 6, n).tolist(),
}


@pytest.mark.parametrize("how", PLACES)
@pytest.mark.parametrize(("n_prefill", "n_decode"), SIZES)
def test_every_entry_is_run_once(how: str, n_prefill: int, n_decode: int) -> None:
    for spare in (1, 6):
        n = n_prefill + n_decode + spare
        found = picks(n_prefill, n_decode, spare, PLACES[how](np.random.default_rng(n), n))
        assert sorted(i for i, is_decode in found if i >= 0 and not is_decode) == list(range(n_prefill))
        assert sorted(i for i, is_decode in found if i >= 0 and is_decode) == list(range(n_decode))
        assert sum(1 for i, _ in found if i < 0) == spare


@pytest.mark.parametrize("how", ["by place", "tickets of one multiprocessor", "tickets in turn"])
def test_decodes_are_spread_among_prefill_tiles(how: str) -> None:
    """Each list is used up from its front, at one pace: any stretch of programs holds its share of both."""
    found = picks(40, 10, 0, PLACES[how](None, 50))
    for is_decode in (0, 1):
        order = [i for i, kind in found if kind == is_decode]
        assert order == sorted(order)
    taken = np.cumsum([is_decode for _, is_decode in found])
    assert np.abs(taken - np.arange(1, 51) / 5).max() <= (4 if how == "tickets in turn" else 1)


@pytest.mark.parametrize("n_decode", [5, 12, 40])
def test_each_multiprocessor_gets_both_kinds(n_decode: int) -> None:
    """With tickets that holds whatever the order in which programs start, here one multiprocessor after the other."""
    sm_of = [i // 20 for i in range(60)]
    found = picks(60 - n_decode, n_decode, 0, sm_of)
    for sm in range(2):  # what the last one draws depends on what the others left
        share = sum(is_decode for (_, is_decode), place in zip(found, sm_of, strict=True) if place == sm) / 20
        assert abs(share - n_decode / 60) <= 0.05 + 1e-9


def test_few_decodes_do_not_wait_for_the_last_tickets() -> None:
    """Multiprocessors begin at different places of the pattern, else none would draw a decode within its few tickets."""
    taken = np.cumsum([is_decode for _, is_decode in picks(90, 10, 0, [i % 20 for i in range(100)])])
    assert taken[49] >= 4


ROWS = 16


def mixed(lab: SimpleNamespace, paged: SimpleNamespace, **changes: object) -> SimpleNamespace:
    """Two prefill chunks, one of them over a prefix, two decodes and a draft of three tokens."""
    rules = lab.make_rules([[(30, 0.2), (0, 1.0)]], sink=5, least=9)
    return paged.Case(rules, [(0, 40), (150, 1), (70, 21), (290, 3), (64, 1)], **{"group": 2, **changes})


def lists(case: SimpleNamespace, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries of prefill [entries, 8], splits of decodes [capacity, 8], and how many of them count [1]."""
    heads = call.heads
    rules = HeadRules(heads.rules.numpy(), heads.rule_of_head.numpy(), heads.sink_tokens, heads.min_span_tokens)
    step = Step(call.slices.numpy(), call.pinned.numpy(), case.group)
    is_decode = step.slices[:, 1] * case.group <= ROWS
    decodes = splits.decode_tiles(len(step.slices))[is_decode]
    work, _ = splits.plan_splits(step, decodes, ROWS, rules, 0, slots=9)
    whole = paged_prefill(case, np.flatnonzero(~is_decode))
    live = int((work[:, 7] > 0).sum())
    assert live > 2 * len(decodes), "no item was cut"
    return whole, torch.from_numpy(work), torch.tensor([live], dtype=torch.int32)


def paged_prefill(case: SimpleNamespace, slices: np.ndarray) -> torch.Tensor:
    entries = [
        (i, h, first, min(32, case.sequences[i][1] * case.group - first), 0, 1 << 30, -1, 1)
        for i in slices.tolist()
        for first in range(0, case.sequences[i][1] * case.group, 32)
        for h in range(case.heads)
    ]
    return torch.tensor(entries, dtype=torch.int32)


def fresh(case: SimpleNamespace, paged: SimpleNamespace, capacity: int) -> tuple[Call, Partials]:
    nan = float("nan")
    return paged.build(case), Partials(torch.full((capacity, ROWS, case.size), nan), torch.full((capacity, ROWS), nan))


PREFILL, DECODE = Tile(32, 64, 4, 1), Tile(ROWS, 32, 4, 1)


@pytest.mark.parametrize("how", PLACES)
def test_equals_separate_launches_bit_for_bit(lab: SimpleNamespace, paged: SimpleNamespace, how: str) -> None:
    case = mixed(lab, paged, learned=True)
    prefill, decode, live = lists(case, paged.build(case))
    serial, serial_partials = fresh(case, paged, len(decode))
    attend_list(serial, prefill, PREFILL)
    attend_list(serial, decode, DECODE, serial_partials, short=True)
    together, partials = fresh(case, paged, len(decode))
    n = len(prefill) + len(decode)
    places = PLACES[how](np.random.default_rng(0), n)
    tickets = None
    if places is not None:
        counters = torch.zeros(2 + max(places) + 1, dtype=torch.int32)
        tickets = Tickets(counters, torch.tensor(places, dtype=torch.int32))
    attend_hybrid(together, HybridWork(prefill, decode, live, PREFILL, DECODE), partials, tickets)
    pairs = [(serial.out, together.out), (serial.lse, together.lse)]
    pairs += [(serial_partials.out, partials.out), (serial_partials.lse, partials.lse)]
    for one, other in pairs:
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))  # NaN where nothing is written, too
    assert not serial.out[: case.gap].isfinite().any()
    assert serial_partials.lse[:, 0].isfinite().any()


def test_tiles_that_cannot_share_a_launch_are_refused() -> None:
    empty = torch.zeros(0, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="same warps and stages"):
        HybridWork(empty, empty, empty, PREFILL, replace(DECODE, warps=8))


def llama(density: float) -> HeadRules:
    """Llama-3-8B's heads with one rule."""
    rules = np.array([[0, round(density * BETA_ONE), MAX_TOKENS]], dtype=np.int64)
    return HeadRules(rules, np.zeros((32, 8), dtype=np.int32), 64, 128)


def prediction(chunk: int, batch: int, density: float, rates: Rates = RATES["NVIDIA H200"], tokens: int = 32768):
    sizes = [(chunk, tokens)] + [(1, tokens)] * batch
    slices = np.array([(0, n, position, i) for i, (n, position) in enumerate(sizes)], dtype=np.int32)
    step = Step(slices, np.zeros(len(slices), dtype=np.int64), 4)
    tiles = splits.row_tiles(step, 128)
    prefill, decode = tiles[tiles[:, 0] == 0], splits.decode_tiles(batch + 1)[1:]
    return predict(step, (prefill, 128), (decode, 16), llama(density), (128, 2), rates)


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    ("chunk", "batch", "low", "high"),
    [(512, 8, 1.40, 1.50), (512, 32, 1.5, 1.6), (2048, 8, 1.08, 1.14), (2048, 32, 1.35, 1.5)],
)
def test_ideal_gains_are_those_computed_elsewhere(
    chunk: int, batch: int, low: float, high: float, density: float
) -> None:
    """Llama-3-8B on an H200; the ratio hardly depends on the density, as a plan shrinks both sides."""
    found = prediction(chunk, batch, density)
    assert low <= found.ideal_gain <= high
    assert found.pays == (found.ideal_gain > 1.15)
    assert f"{found.ideal_gain:.2f}" in found.reason


def test_one_kind_of_work_alone_gains_nothing() -> None:
    assert not prediction(512, 0, 0.5).pays
    assert not prediction(0, 8, 0.5).pays


def test_rates_are_known_by_the_beginning_of_a_name() -> None:
    assert rates_of("NVIDIA H100 80GB HBM3") == RATES["NVIDIA H100"]
    assert rates_of("Tesla T4") is None
