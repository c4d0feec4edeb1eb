"""The run on a CPU with stand-ins for kernels: checked before timed, resumable, within its budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn.attention import SDPBackend

from moa.eval.gpu import bench as bench_module
from moa.eval.gpu import patterns
from moa.eval.gpu.bench import DIED, schedule
from moa.eval.gpu.cases import Case
from moa.eval.gpu.heads import HeadShape
from moa.eval.gpu.inputs import Inputs
from moa.eval.gpu.peer_sdpa import Sdpa
from moa.eval.gpu.rows import read_rows
from moa.eval.gpu.subject import Built
from moa.kernels.reference import reference_attention

CPU, TINY = torch.device("cpu"), HeadShape("tiny", 6, 2, 16)
CASES = [
    Case("decode", TINY, patterns.small(TINY), 200, 2),
    Case("prefill", TINY, patterns.small(TINY), 150),
    Case("chunk", TINY, patterns.small(TINY), 190, 1, 70),
]
SDPA = Sdpa("SDPA", SDPBackend.MATH, CPU)


def attend(case: Case, one: Inputs) -> torch.Tensor:
    """A step of equal sequences: [S, C, HQ, D]."""
    (data,) = one.parts
    positions = torch.arange(data.part.cached, data.part.cached + data.part.new)
    starts = torch.from_numpy(case.pattern.rules.window_start(positions.numpy())[one.layer])
    sinks = case.pattern.rules.sink_tokens
    sequences = [
        reference_attention(q, k.transpose(0, 1), v.transpose(0, 1), positions, starts, sinks)[0]
        for q, k, v in zip(data.q, data.k, data.v, strict=True)
    ]
    return torch.stack(sequences)


@dataclass
class Ours:
    """What our kernels should compute, by the reference; with a fault on demand."""

    name: str = "moa"
    fault: str = ""
    mask: str = "same"
    needs_s: float = 1.0
    is_ours: bool = True
    built: list[str] = field(default_factory=list)

    def missing(self) -> str | None:
        return None

    def refuses(self, case: Case) -> str | None:
        return None

    def build(self, case: Case, inputs: Sequence) -> Built:
        self.built.append(case.name)
        if self.fault == "raise":
            raise RuntimeError("no shared memory\nat all")
        made = Built(tuple(lambda one=one: attend(case, one) for one in inputs), lambda out: [out])
        if self.fault == "small" and case.tokens == 90:
            return Built(tuple(lambda c=call: c() * 1.05 for call in made.calls), made.outputs)
        if self.fault == "large" and case in CASES:
            return Built(tuple(lambda c=call: c().clone().fill_(torch.nan) for call in made.calls), made.outputs)
        if self.fault == "slight" and case in CASES:
            return Built(tuple(lambda c=call: c() * 1.001 for call in made.calls), made.outputs)
        return Built(made.calls, made.outputs, 1234)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Few turns, and one small case per kind, of 90 tokens."""
    made = {"decode": {}, "prefill": {}, "chunk": {"chunk": 30}}
    monkeypatch.setattr(
        bench_module.check, "small_cases", lambda case: [Case(case.kind, TINY, case.pattern, 90, **made[case.kind])]
    )
    monkeypatch.setattr("moa.eval.gpu.timing.TURNS_S", 0.0)
    monkeypatch.setattr("moa.eval.gpu.timing.FEWEST_TURNS", 2)


def test_every_subject_gets_a_row_with_its_work_and_its_error(a_bench, tmp_path) -> None:
    told = []
    a_bench(tell=told.append).run([CASES], [Ours(), SDPA])
    rows = {row.key: row for row in read_rows(tmp_path / "rows.csv")}
    assert set(rows) == {(case.name, name) for case in CASES for name in ("moa", "SDPA")}
    assert [row.key for row in told] == list(rows)
    for row in rows.values():
        assert (row.status, row.turns, row.launch) == ("ok", row.turns, "eager")
        assert 0 < row.low_us <= row.median_us <= row.high_us
        assert row.tflops == pytest.approx(row.flops / row.median_us / 1e6, rel=1e-4)
        assert row.of_copy_ratio == pytest.approx(row.gb_per_s * 1e9 / 1e10, rel=1e-4)
        assert 0 <= row.error < 1e-4
        assert row.stored_kv_bytes == (1234 if row.subject == "moa" else None)
    ours, dense = (rows[CASES[0].name, name] for name in ("moa", "SDPA"))
    assert ours.kv_bytes < dense.kv_bytes == ours.dense_kv_bytes


@pytest.mark.parametrize(
    ("fault", "status"), [("small", "wrong"), ("large", "wrong"), ("slight", "wrong"), ("raise", "failed")]
)
def test_a_faulty_kernel_is_not_timed_and_the_others_go_on(a_bench, tmp_path, fault, status) -> None:
    a_bench().run([CASES[1:2]], [Ours(fault=fault), SDPA])
    ours, peer = list(read_rows(tmp_path / "rows.csv"))[-3], read_rows(tmp_path / "rows.csv")[-1]
    assert (ours.subject, ours.status, ours.median_us) == ("moa", status, None)
    assert {
        "small": "90 tokens",
        "large": "off by inf",
        "slight": "off by 0.001",
        "raise": "RuntimeError: no shared memory",
    }[fault] in ours.reason
    assert (peer.subject, peer.status) == ("SDPA", "ok")


def test_small_cases_are_compared_once_per_kind_of_kernel(a_bench) -> None:
    again = Case("decode", TINY, patterns.small(TINY), 260, 2)
    ours = Ours()
    a_bench().run([[CASES[0], again]], [ours])
    assert len(ours.built) == len(set(ours.built)) == 3, "a small case once, and the two cases"


def test_a_resumed_run_measures_what_is_left(a_bench, tmp_path) -> None:
    a_bench().run([CASES[:1]], [SDPA])
    first = read_rows(tmp_path / "rows.csv")
    ours = Ours()
    a_bench().run([CASES[:1]], [ours, SDPA])
    rows = read_rows(tmp_path / "rows.csv")
    assert rows[: len(first)] == first
    assert {row.subject for row in rows[len(first) :]} == {"moa"}


def test_a_killed_process_leaves_its_row_behind(a_bench, tmp_path, monkeypatch) -> None:
    def die(self, case, inputs):
        raise SystemExit(1)

    monkeypatch.setattr(Ours, "build", die)
    with pytest.raises(SystemExit):
        a_bench().run([CASES[:1]], [Ours(), SDPA])
    (row,) = read_rows(tmp_path / "rows.csv")
    assert (row.subject, row.status, row.reason) == ("moa", "failed", DIED)
    a_bench().run([CASES[:1]], [Ours(), SDPA])
    assert [row.subject for row in read_rows(tmp_path / "rows.csv")] == ["moa", "SDPA", "SDPA"], (
        "and is not tried again"
    )


def test_nothing_begins_that_has_no_time(a_bench, tmp_path) -> None:
    late = a_bench(deadline_s=time.monotonic() + 5.0)
    slow = Ours("slow", needs_s=60.0)
    late.run([CASES[:1]], [slow, Ours()])
    assert not slow.built
    assert {row.subject for row in read_rows(tmp_path / "rows.csv")} == {"moa"}
    assert late.file.is_done(CASES[0].name, "moa")
    assert not late.file.is_done(CASES[0].name, "slow"), "a later run may have the time"


def test_what_is_missing_or_refused_has_a_row_and_runs_nothing(a_bench, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Ours, "missing", lambda self: "not installed")
    hybrid = Case("hybrid", TINY, patterns.small(TINY), 200, 2, 50, prompts=1)
    a_bench().run([[hybrid]], [Ours(), SDPA])
    a_bench().run([[hybrid]], [Ours(), SDPA])
    rows = read_rows(tmp_path / "rows.csv")
    assert [(r.case, r.subject, r.status, r.reason) for r in rows] == [
        (bench_module.EVERY_CASE, "moa", "missing", "not installed"),
        (hybrid.name, "SDPA", "unsupported", "one length per call"),
    ], "once, also in a second run"
    monkeypatch.setattr(Ours, "missing", lambda self: None)
    a_bench().run([CASES[:1]], [Ours()])
    assert read_rows(tmp_path / "rows.csv")[-1].status == "ok", "it has been installed since"


def test_quick_subjects_come_first_within_a_tier() -> None:
    quick, slow = Ours("quick"), Ours("slow", needs_s=bench_module.QUICK_S + 1)
    order = [(case, s.name) for case, some in schedule([CASES[:2], CASES[2:]], [slow, quick]) for s in some]
    names = [name for _, name in order]
    assert names == ["quick", "quick", "slow", "slow", "quick", "slow"]


def test_memory_that_runs_out_is_a_reason(a_bench, tmp_path, monkeypatch) -> None:
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench_module, "make_inputs", full)
    a_bench().run([CASES[:1]], [SDPA])
    (row,) = read_rows(tmp_path / "rows.csv")
    assert (row.status, row.reason) == ("failed", "OutOfMemoryError: CUDA out of memory.")
