"""Every head size with every grouping and dtype, in every way of the torch backend; in pairs for Triton's interpreter, which
is slow. Scores, native windows and the log-sum-exp take turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product
from types import SimpleNamespace

import pytest
import torch

import moa.kernels.banded
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory

SIZES, GROUPS = (64, 80, 96, 128, 256), (1, 2, 4, 7, 8)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
SCORES = cycle([{}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 5.0, "sinks": True}])
NATIVE, LSE = cycle([None, 5, None]), cycle([False, True, True, False, True])
Combination = tuple[int, int, torch.dtype, dict[str, object], int | None, bool]
# Cycles of four, three and five: options meet sizes, groupings and dtypes in ever other pairs.
ALL: list[Combination] = [
    (size, group, dtype, scores, native, lse)
    for (size, group, dtype), scores, native, lse in zip(
        product(SIZES, GROUPS, TOLERANCE), SCORES, NATIVE, LSE, strict=False
    )
]
# Every size with every grouping once, and every dtype with each of them.
IN_PAIRS = [one for one in ALL if (SIZES.index(one[0]) + GROUPS.index(one[1])) % 3 == list(TOLERANCE).index(one[2])]
PAIRS, STEPS = [[(4, 0.2), (0, 1.0)]], (33, 1, 7)


def compare(
    lab: SimpleNamespace, backend: str, combinations: list[Combination], steps: Sequence[int], grad: bool = False
) -> None:
    """A prompt, a decode and a draft of one sequence, against float64."""
    rules, tokens = lab.make_rules(PAIRS, 1, 3), sum(steps)
    for size, group, dtype, scores, native, lse in combinations:
        q, k, v = lab.make_qkv(tokens, 2 * group, 2, size, size + group, dtype)
        sinks = torch.linspace(-2, 2, 2 * group) if "sinks" in scores else None
        options = {**scores, "sinks": sinks}
        kv, outs, at = new_memory(backend, rules, [native]), [], 0
        kv.add(0)
        for count in steps:
            part = [x[at : at + count] for x in (q.requires_grad_(grad), k, v)]
            found = attend(*part, kv, 0, Batch.pack([(0, count, at)]), return_lse=lse, **options)
            outs.append((found[0] if lse else found).detach())
            at += count
        got, want = torch.cat(outs), lab.oracle(rules, (q.detach(), k, v), native=native, **options)
        bound, named = TOLERANCE[dtype], f"{size}, {group}:1, {dtype}, {options}, {native}"
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound, msg=lambda m, n=named: f"{n}: {m}")


@pytest.mark.parametrize("way", ["tiles", "flash", "masks"])
def test_the_torch_backend(lab: SimpleNamespace, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moa.kernels.banded, "SHORT_TOKENS", (0, 0))
    if way == "flash":
        monkeypatch.setattr(moa.kernels.banded, "tiles_run", lambda q: False)
    compare(lab, "torch", ALL, STEPS, grad=way == "masks")


def test_the_reference(lab: SimpleNamespace) -> None:
    compare(lab, "reference", ALL, STEPS)


def test_the_triton_backend(lab: SimpleNamespace) -> None:
    assert len({one[:2] for one in IN_PAIRS}) == 25
    assert len({(one[0], one[2]) for one in IN_PAIRS}) == len({(one[1], one[2]) for one in IN_PAIRS}) == 15
    compare(lab, "triton", IN_PAIRS, (5, 1))
