"""KV memory: what it holds, what it costs, and that it is given back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.kernels.dispatch import new_memory


@pytest.mark.parametrize("chunks", [[512], [512, *[1] * 200], [100] * 9, [*[1] * 700]], ids=["512", "+1", "900", "1s"])
def test_bytes_measured_equal_bytes_computed_within_two_percent(lab: SimpleNamespace, chunks: list[int]) -> None:
    rules = lab.make_rules([[(0, 0.25), (64, 0.1), (0, 0.5), (0, 1.0)], [(0, 0.0), (200, 0.0), (-100, 0.5), (0, 0.75)]],
                           sink=64, least=128)  # fmt: skip
    kv, length = lab.new_torch_memory(rules), sum(chunks)
    for layer in range(2):
        lab.run_steps(kv, lab.make_qkv(length, 4, 4, 32, layer), chunks, layer=layer)
    assert kv.kv_bytes == pytest.approx(rules.kv_bytes(length, 32, 4), rel=0.02)
    assert kv.kv_bytes >= rules.kv_bytes(length, 32, 4)


@settings(max_examples=20, deadline=None)
@given(alpha=st.integers(-50, 100), beta=st.sampled_from([0.0, 0.1, 0.33, 0.7, 1.0]), start=st.integers(1, 60))
def test_stored_tokens_equal_the_span_after_every_token(
    lab: SimpleNamespace, alpha: int, beta: float, start: int
) -> None:
    rules = lab.make_rules([[(alpha, beta), (9, 0.0)]])
    kv = lab.new_torch_memory(rules)
    lab.run_steps(kv, lab.make_qkv(start, 2, 2, 8, 0), [start])
    for n in range(start + 1, start + 80):
        lab.run_steps(kv, lab.make_qkv(1, 2, 2, 8, n), [1])
        assert kv.stored_tokens(0, 0) == rules.span(n)[0].tolist()


def test_removing_sequences_gives_all_memory_back(lab: SimpleNamespace) -> None:
    rules = lab.make_rules([[(0, 0.5)]])
    with new_memory("torch", rules) as kv:
        for i in range(3):
            kv.add(i)
            lab.run_steps(kv, lab.make_qkv(50, 1, 1, 8, i), [50], sequence=i)
        each = kv.kv_bytes // 3
        kv.remove(1)
        assert kv.kv_bytes == 2 * each
        assert kv.sequences == (0, 2)
    assert kv.kv_bytes == 0


@settings(max_examples=20, deadline=None)
@given(sources=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_selected_sequences_go_on_as_their_sources_would(lab: SimpleNamespace, sources: list[int]) -> None:
    rules = lab.make_rules([[(0, 0.5), (10, 0.0)]])
    inputs = [lab.make_qkv(40, 2, 2, 8, i) for i in range(3)]
    kv = new_memory("torch", rules)
    for i, qkv in enumerate(inputs):
        kv.add(i)
        lab.run_steps(kv, [x[:20] for x in qkv], [13, *[1] * 7], sequence=i)
    kv.select(sources)
    assert kv.sequences == tuple(range(len(sources)))
    for i, source in enumerate(sources):
        out = lab.run_steps(kv, [x[20:] for x in inputs[source]], [*[1] * 15, 5], sequence=i)
        torch.testing.assert_close(out.double(), lab.oracle(rules, inputs[source])[20:], atol=1e-5, rtol=1e-5)
    for i in range(len(sources)):
        kv.remove(i)
    assert kv.kv_bytes == 0


def test_a_copy_goes_on_as_its_source_would_and_leaves_it_alone(lab: SimpleNamespace) -> None:
    rules = lab.make_rules([[(0, 0.5), (10, 0.0)]])
    kv, (q, k, v) = new_memory("torch", rules), lab.make_qkv(40, 2, 2, 8, 0)
    kv.add(3)
    lab.run_steps(kv, (q[:20], k[:20], v[:20]), [13, *[1] * 7], sequence=3)
    with pytest.raises(ValueError, match="sequence 3 is already held"):
        kv.copy(3, 3)
    with pytest.raises(ValueError, match="sequence 4 is not held"):
        kv.copy(4, 5)
    kv.copy(3, 7)
    for sequence in (7, 3):
        out = lab.run_steps(kv, (q[20:], k[20:], v[20:]), [*[1] * 15, 5], sequence=sequence)
        torch.testing.assert_close(out.double(), lab.oracle(rules, (q, k, v))[20:], atol=1e-5, rtol=1e-5)
        kv.remove(sequence)
    assert kv.kv_bytes == 0


def test_reference_memory_keeps_everything_and_says_so(lab: SimpleNamespace) -> None:
    rules = lab.make_rules([[(10, 0.0), (0, 0.5)]])
    kv = new_memory("reference", rules)
    kv.add(0)
    qkv = lab.make_qkv(50, 4, 2, 8, 0)
    out = lab.run_steps(kv, qkv, [20, *[1] * 10, 20])
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv), atol=1e-5, rtol=1e-5)
    assert kv.stored_tokens(0, 0) == [50, 50]


def test_admission_errors(lab: SimpleNamespace) -> None:
    kv = new_memory("torch", lab.make_rules([[(0, 0.5)]], mode="pinned"))
    for length in (None, 0, -3):
        with pytest.raises(ValueError, match=f"pinned_tokens.*at least 1 token; got {length}"):
            kv.add(0, length)
        assert kv.sequences == ()
    kv.add(0, 100)
    with pytest.raises(ValueError, match="already held"):
        kv.add(0, 100)
    with pytest.raises(ValueError, match="native_windows"):
        new_memory("torch", kv.rules, [None, 3])
