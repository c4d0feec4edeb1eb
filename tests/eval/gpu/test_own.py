"""Our kernels in Triton's interpreter, as the benchmark runs them: over filled pages, again and again."""

from __future__ import annotations

import pytest
import torch

from moa.eval.gpu import bench as bench_module
from moa.eval.gpu import check, patterns
from moa.eval.gpu.cases import Case
from moa.eval.gpu.heads import HeadShape
from moa.eval.gpu.inputs import make_inputs
from moa.eval.gpu.own import Kernels, Planner, plans_agree
from moa.eval.gpu.own_mixed import Mixed
from moa.eval.gpu.subjects import all_subjects
from moa.eval.gpu.targets import OURS, PLANNER, SERIAL, TICKETS, WHOLE_STEP
from moa.eval.gpu.whole_step import WholeStep

CPU, TINY = torch.device("cpu"), HeadShape("tiny", 4, 2, 16)
RULES = patterns.Pattern(
    "two", patterns.span_rules([[patterns.ElasticRule(20, 0.5), patterns.DENSE], [patterns.ElasticRule(130, 0.0)] * 2])
)
CASES = {
    "prefill": Case("prefill", TINY, RULES, 70),
    "chunk": Case("chunk", TINY, RULES, 200, 1, 30),
    "decode": Case("decode", TINY, RULES, 200, 2),
    "hybrid": Case("hybrid", TINY, RULES, 140, 1, 12, prompts=1),
}

# kernels are interpreted slowly: the least that has moving windows
SHORT = patterns.Pattern("one", patterns.span_rules([[patterns.ElasticRule(0, 0.5), patterns.DENSE]]))
DECODE = Case("decode", TINY, SHORT, 140)


@pytest.mark.parametrize(
    ("kind", "subject"),
    [*((kind, Kernels()) for kind in CASES), ("hybrid", Mixed("serial")), ("hybrid", Mixed("tickets"))],
)
def test_kernels_compute_the_plan_s_mask_over_and_over(kind, subject) -> None:
    case = CASES[kind]
    assert subject.refuses(case) is None
    inputs = make_inputs(case, 2, CPU, torch.float32)
    built = subject.build(case, inputs)
    for _ in range(2):
        for one, call in zip(inputs, built.calls, strict=True):
            outputs = built.outputs(call())
            assert check.worst_error(case, one, outputs, "same", every_row=True) < check.FLOAT32_TOLERANCE
            for output in outputs:
                output.fill_(torch.nan)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_eight_bits_are_within_their_tolerance_and_beyond_bfloat16_s(kv) -> None:
    case = Case("decode", TINY, RULES, 300, 1, kv=kv)
    (one,) = inputs = make_inputs(case, 1, CPU, torch.float32)
    built = Kernels().build(case, inputs)
    error = check.worst_error(case, one, built.outputs(built.calls[0]()), "same", every_row=True)
    assert check.FLOAT32_TOLERANCE < error < check.TOLERANCE[kv]


def test_a_whole_step_runs_on_the_triton_backend() -> None:
    (one,) = inputs = make_inputs(DECODE, 1, CPU, torch.float32)
    built = WholeStep("triton").build(DECODE, inputs)
    out = built.outputs(built.calls[0]())
    assert check.worst_error(DECODE, one, out, "same", every_row=True) < check.FLOAT32_TOLERANCE


def test_the_planner_is_held_against_its_reference(monkeypatch) -> None:
    monkeypatch.setattr("moa.eval.gpu.own.PLANNED_LAYERS", 3)
    case = CASES["decode"]
    inputs = make_inputs(case, 1, CPU, torch.float32)
    agreed = []
    monkeypatch.setattr("moa.eval.gpu.own.plans_agree", lambda *a: agreed.append((a, plans_agree(*a))) or agreed[-1][1])
    assert Planner().build(case, inputs).error() == 0.0
    (arguments, _), lists = agreed[0], agreed[0][0][1]
    lists.work[1, 0, 5] += 1
    assert not plans_agree(*arguments)


def test_a_run_measures_all_of_ours(a_bench, monkeypatch) -> None:
    monkeypatch.setattr("moa.eval.gpu.timing.FEWEST_TURNS", 1)
    monkeypatch.setattr("moa.eval.gpu.timing.TURNS_S", 0.0)
    monkeypatch.setattr("moa.eval.gpu.own.PLANNED_LAYERS", 2)
    monkeypatch.setattr(bench_module.check, "small_cases", lambda case: [])
    ours = [subject for subject in all_subjects(CPU) if subject.is_ours]
    bench = a_bench()
    bench.run([[DECODE]], ours)
    last = {row.key: row for row in bench.file.rows}
    got = {(row.kind, row.subject) for row in last.values() if row.status == "ok"}
    assert got == {("decode", name) for name in (OURS, PLANNER, WHOLE_STEP)}, [row.reason for row in last.values()]
    refused = {row.subject for row in last.values() if row.status == "unsupported"}
    assert refused == {SERIAL, TICKETS} == {s.name for s in ours if s.refuses(CASES["hybrid"]) is None} - {OURS}
    plan, ours_row = (last[DECODE.name, name] for name in (PLANNER, OURS))
    assert (plan.tflops, plan.gb_per_s, plan.flops) == (None, None, None)
    assert plan.median_us > 0 < ours_row.tflops
