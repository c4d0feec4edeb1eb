"""What a step launches: short chunks are cut, mixed steps go together or apart as asked, and results stay the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moa.errors import ResourceError, UsageError
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend
from moa.kernels.paged import lists
from moa.kernels.paged.configs import Device, table_for
from moa.kernels.paged.lists import Cut, Lists, Machine, Whole
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.paged.predict import Rates

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 227)


def lists_of(kv: PagedMemory) -> Lists:
    """Of the step that ran last."""
    (arena,) = kv.arenas
    (found,) = arena.step.lists.values()
    return found


def filled(lab: SimpleNamespace, cached: list[int], new: list[int], launches: str = "auto") -> SimpleNamespace:
    """Sequences with `cached` tokens, and their next step with `new` tokens each run."""
    rules = lab.make_rules([[(30, 0.2), (0, 1.0)]], sink=5, least=9)
    texts = [lab.make_qkv(a + b, 4, 2, 16, i) for i, (a, b) in enumerate(zip(cached, new, strict=True))]
    kv = PagedMemory(rules, launches=launches)
    for i, (count, text) in enumerate(zip(cached, texts, strict=True)):
        kv.add(i)
        if count:
            attend(*[x[:count] for x in text], kv, 0, Batch.pack([(i, count, 0)]))
    batch = Batch.pack([(i, b, a) for i, (a, b) in enumerate(zip(cached, new, strict=True))])
    packed = [torch.cat([text[x][a:] for text, a in zip(texts, cached, strict=True)]) for x in range(3)]
    out, lse = attend(*packed, kv, 0, batch, return_lse=True)
    wanted = torch.cat([lab.oracle(rules, text)[a:] for text, a in zip(texts, cached, strict=True)])
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    return SimpleNamespace(out=out, lse=lse, lists=lists_of(kv))


@pytest.fixture(scope="module")
def apart(lab: SimpleNamespace) -> SimpleNamespace:
    """A mixed step in two launches."""
    return filled(lab, [0, 70, 140, 64], [40, 1, 3, 1], "serial")


@pytest.mark.parametrize("launches", ["spread", "tickets"])
def test_one_launch_gives_what_two_do_bit_for_bit(lab: SimpleNamespace, apart: SimpleNamespace, launches: str) -> None:
    together = filled(lab, [0, 70, 140, 64], [40, 1, 3, 1], launches)
    assert (apart.lists.launch, together.lists.launch, together.lists.reason) == ("serial", launches, "asked for")
    assert (apart.lists.prefill.tile.rows, apart.lists.prefill.tile.keys) == (
        together.lists.prefill.tile.rows,
        together.lists.prefill.tile.keys,
    )
    assert torch.equal(apart.out, together.out)
    assert torch.equal(apart.lse, together.lse)


def test_an_unknown_gpu_launches_apart_and_says_why(lab: SimpleNamespace) -> None:
    kv, (q, k, v) = (
        PagedMemory(lab.make_rules([[(30, 0.2)]], sink=5, least=9)),
        lab.make_qkv(41, 1, 1, 16, 0, torch.float16),
    )
    for i in range(2):
        kv.add(i)
    attend(q, k, v, kv, 0, Batch.pack([(0, 40, 0), (1, 1, 0)]))
    found = lists_of(kv)
    assert (found.launch, found.reason) == ("serial", "rates of this GPU are not known")


def test_a_step_of_one_kind_has_one_way(lab: SimpleNamespace) -> None:
    found = filled(lab, [70, 3], [1, 1], "spread").lists
    assert (found.launch, found.reason) == ("serial", "prefill and decodes do not meet")


def test_long_drafts_keep_launches_apart(lab: SimpleNamespace) -> None:
    """In one launch they would be whole tiles, each in one thread block over the whole text."""
    found = filled(lab, [3, 70, 5], [40, 10, 1]).lists
    assert (found.launch, found.reason) == ("serial", "drafts too long to be cut in one launch")


@pytest.mark.parametrize(("decode_rate", "gain", "launch"), [(1e9, "2.00", "spread"), (1e12, "1.00", "serial")])
def test_launches_go_together_where_a_gain_is_predicted(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, decode_rate: float, gain: str, launch: str
) -> None:
    """As on GPUs that take as long for this step's decode (16 KiB of keys and values) as for its tiles (1 MFLOP), or no time."""
    monkeypatch.setattr(lists, "rates_of", lambda name: Rates(64e9, decode_rate))
    rules, texts = lab.make_rules([[(30, 0.2), (0, 1.0)]], sink=5, least=9), []
    kv = PagedMemory(rules)
    for i, n in enumerate((2, 40)):
        kv.add(i)
        texts.append(lab.make_qkv(n, 4, 2, 16, i, torch.float16))
    attend(*[x[:1] for x in texts[0]], kv, 0, Batch.pack([(0, 1, 0)]))
    packed = [torch.cat((a[1:], b)) for a, b in zip(*texts, strict=True)]
    out = attend(*packed, kv, 0, Batch.pack([(0, 1, 1), (1, 40, 0)]))
    found = lists_of(kv)
    assert (found.launch, found.reason) == (launch, f"ideal gain {gain}, wanted more than 1.15")
    wanted = torch.cat((lab.oracle(rules, texts[0])[1:], lab.oracle(rules, texts[1])))
    torch.testing.assert_close(out.double(), wanted, atol=4e-3, rtol=4e-3)


def test_float32_launches_apart_and_says_why(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "rates_of", lambda name: Rates(64e9, 1e9))
    found = filled(lab, [0, 70], [40, 1]).lists
    assert (found.launch, found.reason) == ("serial", "rates are known for 16-bit queries only")


def test_a_chunk_too_short_for_the_gpu_is_cut(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 24 multiprocessors for two tiles, the chunk's keys are divided among them; with 2 the tiles stay whole."""
    assert isinstance(filled(lab, [5], [17]).lists.prefill, Whole)
    machine = Machine.of(torch.device("cpu"))
    monkeypatch.setattr(Machine, "of", lambda device: Machine(machine.device, machine.table, 24))
    cut = filled(lab, [290], [17]).lists.prefill
    assert isinstance(cut, Cut)
    assert int(cut.plan.live[0]) > 2


def test_drafts_beyond_the_smallest_tile_are_still_decodes(lab: SimpleNamespace) -> None:
    """Ten tokens of two query heads each: 20 rows."""
    found = filled(lab, [130, 5], [10, 1]).lists
    assert found.prefill is None
    assert found.decode.tile.rows == 32


def test_a_device_without_enough_shared_memory_is_refused_before_anything_changes(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> Machine:
        return Machine(H100, table_for(H100._replace(shared_kib=40)), 1)

    kv = PagedMemory(lab.make_rules([[(0, 1.0)]]))
    kv.add(0)
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "of", refuse)
        with pytest.raises(ResourceError, match="too little shared memory"):
            attend(*lab.make_qkv(2, 1, 1, 16, 0), kv, 0, Batch.pack([(0, 2, 0)]))
    assert kv.length(0, 0) == 0
    assert kv.kv_bytes == 0
    attend(*lab.make_qkv(2, 1, 1, 16, 0), kv, 0, Batch.pack([(0, 2, 0)]))


def test_fp8_without_e4m3_is_refused_before_anything_changes(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    a100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 163)
    monkeypatch.setattr(Machine, "of", lambda device: Machine(a100, table_for(a100), 108))
    kv = PagedMemory(lab.make_rules([[(0, 1.0)]]), kv_dtype="fp8")
    kv.add(0)
    with pytest.raises(ResourceError, match=r"FP8 .* NVIDIA A100.* has 8.0; use int8"):
        attend(*lab.make_qkv(2, 1, 1, 16, 0), kv, 0, Batch.pack([(0, 2, 0)]))
    assert kv.kv_bytes == 0


def test_an_unknown_way_to_launch_is_refused(lab: SimpleNamespace) -> None:
    with pytest.raises(
        UsageError, match=r"launches must be one of auto, serial, spread, tickets.* did you mean 'serial'"
    ):
        PagedMemory(lab.make_rules([[(0, 1.0)]]), launches="seria")
