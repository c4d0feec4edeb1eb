"""Steps through `attend` compute the plan's mask, turn after turn."""

from __future__ import annotations

import pytest
import torch

from moa.eval.gpu import check, patterns
from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import make_inputs
from moa.eval.gpu.timing import measure
from moa.eval.gpu.whole_step import WholeStep

CPU = torch.device("cpu")


@pytest.mark.parametrize("sets", [1, 3])
def test_a_step_computes_the_plan_s_mask_and_can_be_repeated(case, sets, host_clock) -> None:
    subject = WholeStep("torch")
    if case.kind == "chunk":
        assert "repeated" in subject.refuses(case)
        return
    assert subject.refuses(case) is None
    inputs = make_inputs(case, sets, CPU, torch.float32)
    built = subject.build(case, inputs)
    for one, call in zip(inputs, built.calls, strict=True):
        assert check.worst_error(case, one, built.outputs(call()), "same", every_row=True) < check.FLOAT32_TOLERANCE
    assert measure(built.calls, host_clock, turns_s=0).turns > 1


def test_what_a_decode_stores_is_counted_for_one_layer(case) -> None:
    decode = Case("decode", case.heads, patterns.uniform(0.5, case.heads), 600, 2)
    inputs = make_inputs(decode, 2, CPU, torch.float32)
    live = 2 * 2 * 300 * 2 * case.heads.head_dim * 4
    assert WholeStep("torch").build(decode, inputs).stored_kv_bytes == pytest.approx(live, rel=0.15)


def test_pinned_lengths_are_the_case_s(case) -> None:
    rules = patterns.small(case.heads).rules
    pinned = patterns.Pattern("pinned", patterns.SpanRules(rules.alpha, rules.beta_fixed, 64, 128, "pinned"))
    decode = Case("decode", case.heads, pinned, 400, 2)
    (one,) = inputs = make_inputs(decode, 1, CPU, torch.float32)
    built = WholeStep("torch").build(decode, inputs)
    out = built.outputs(built.calls[0]())
    assert check.worst_error(decode, one, out, "same", every_row=True) < check.FLOAT32_TOLERANCE
