"""The Triton backend end to end, through attend(), against the float64 oracle; in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import UsageError
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory

PAIRS = st.tuples(st.sampled_from([-20, 0, 10, 70]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))


@st.composite
def plans(draw: st.DrawFn, lab: SimpleNamespace) -> SimpleNamespace:
    """Rules of one layer with two KV heads, and how keys are scored."""
    sink = draw(st.sampled_from([0, 1, 4, 64, 70]))
    mode = draw(st.sampled_from(["running", "pinned"]))
    rules = lab.make_rules([[draw(PAIRS), draw(PAIRS)]], sink, sink + draw(st.sampled_from([1, 2, 30])), mode)
    return SimpleNamespace(
        rules=rules,
        group=draw(st.sampled_from([1, 3])),
        native=draw(st.sampled_from([None, None, 1, 5, 40, 100])),
        softcap=draw(st.sampled_from([None, None, 1.0])),
        learned=draw(st.booleans()),
    )


@settings(max_examples=6)
@given(data=st.data())
def test_steps_of_several_sequences_equal_the_oracle(lab: SimpleNamespace, data: st.DataObject) -> None:
    """Prefill chunks, decodes and draft tokens of up to three sequences, packed in any way, padding between them."""
    plan = data.draw(plans(lab))
    lengths = data.draw(st.lists(st.sampled_from([1, 3, 64, 70]), min_size=1, max_size=2))
    pinned = [data.draw(st.sampled_from([n, n // 2 + 1, 2 * n])) for n in lengths]
    inputs = [lab.make_qkv(n, 2 * plan.group, 2, 16, i) for i, n in enumerate(lengths)]
    options = {"softcap": plan.softcap, "sinks": torch.linspace(-2, 2, 2 * plan.group) if plan.learned else None}
    kv = new_memory("triton", plan.rules, [plan.native])
    for i, n in enumerate(pinned):
        kv.add(i, n)
    done, outs, lses = [0] * len(lengths), [[] for _ in lengths], [[] for _ in lengths]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        takes = [min(n - d, data.draw(st.sampled_from([1, 3, 64, 70]))) for d, n in zip(done, lengths, strict=True)]
        gap = data.draw(st.sampled_from([0, 2]))
        parts = [(i, t, done[i]) for i, t in enumerate(takes) if t]
        batch = Batch(tuple(s._replace(offset=s.offset + gap) for s in Batch.pack(parts).slices))
        packed = [torch.cat([inputs[i][x][d : d + t] for i, t, d in parts]) for x in range(3)]
        packed = [torch.cat((torch.full((gap, *x.shape[1:]), torch.nan), x)) for x in packed]
        out, lse = attend(*packed, kv, 0, batch, return_lse=True, **options)
        assert out[:gap].eq(0).all()
        assert lse[:gap].isneginf().all()
        for item in batch.slices:
            outs[item.sequence].append(out[item.offset : item.offset + item.tokens])
            lses[item.sequence].append(lse[item.offset : item.offset + item.tokens])
            done[item.sequence] += item.tokens
    for i, qkv in enumerate(inputs):
        length = plan.rules.pinned_length(pinned[i]) if plan.rules.length_mode == "pinned" else None
        want = lab.oracle(plan.rules, qkv, pinned=length, native=plan.native, **options)
        torch.testing.assert_close(torch.cat(outs[i]).double(), want, atol=1e-5, rtol=1e-5)


def test_a_step_of_padding_alone_gives_zeros(lab: SimpleNamespace) -> None:
    kv = new_memory("triton", lab.make_rules([[(0, 1.0)]]))
    q, k, v = lab.make_qkv(3, 2, 1, 16, 0)
    out, lse = attend(q, k, v, kv, 0, Batch(()), return_lse=True)
    assert out.eq(0).all()
    assert lse.isneginf().all()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale_will_do(lab: SimpleNamespace, scale: float) -> None:
    rules, qkv = lab.make_rules([[(9, 0.3)]]), lab.make_qkv(30, 2, 1, 16, 0)
    kv = new_memory("triton", rules)
    kv.add(0)
    out = lab.run_steps(kv, qkv, [30], scale=scale)
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv, scale=scale), atol=1e-5, rtol=1e-5)


def test_a_cpu_without_interpreter_is_refused(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from moa.kernels.paged import launch

    kv = new_memory("triton", lab.make_rules([[(0, 1.0)]]))
    kv.add(0)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UsageError, match="runs on CUDA, got a tensor on cpu"):
        attend(*lab.make_qkv(2, 1, 1, 16, 0), kv, 0, Batch.pack([(0, 2, 0)]))
    with pytest.raises(UsageError, match="no CUDA device"):
        new_memory("triton", kv.rules)
