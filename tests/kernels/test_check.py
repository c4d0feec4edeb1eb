"""Bad input to attend(): refused before any work, with the argument, what was wanted, what was got, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moa.kernels.batch import Batch, Slice
from moa.kernels.dispatch import BACKENDS, attend, new_memory
from moa.kernels.memory import KVMemory

HEADS, KV_HEADS, SIZE, LAYERS = 4, 2, 32, 2
Call = dict[str, Any]


def step(lab: SimpleNamespace, kv: KVMemory) -> Call:
    """A good call: a prefill chunk of sequence 0, padding, and a decode of sequence 1, after 40 tokens of each."""
    q, k, v = lab.make_qkv(9, HEADS, KV_HEADS, SIZE, 7)
    batch = Batch((Slice(0, 0, 6, 40), Slice(1, 8, 1, 40)))
    return {"q": q, "k": k, "v": v, "kv": kv, "layer": 0, "batch": batch, "sinks": torch.zeros(HEADS)}


def memory(lab: SimpleNamespace, backend: str) -> KVMemory:
    """Two layers, two sequences of 40 tokens in layer 0."""
    kv = new_memory(backend, lab.make_rules([[(20, 0.0), (0, 0.5)]] * LAYERS))
    for sequence in range(2):
        kv.add(sequence)
        lab.run_steps(kv, lab.make_qkv(40, HEADS, KV_HEADS, SIZE, sequence), [40], sequence=sequence)
    return kv


def state(kv: KVMemory) -> object:
    """What a refused call must leave as it was."""
    tokens = [(kv.length(s, i), kv.stored_tokens(s, i)) for s in kv.sequences for i in range(LAYERS)]
    return kv.sequences, kv.kv_bytes, dict(kv.formats), tokens


def each(convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Call], Call]:
    """Change q, k and v alike."""
    return lambda call: {name: convert(call[name]) for name in "qkv"}


def slices(*items: tuple[int, int, int, int]) -> Callable[[Call], Call]:
    """Another batch."""
    return lambda call: {"batch": Batch(tuple(Slice(*item) for item in items))}


BAD: dict[str, tuple[Callable[[Call], Call], str]] = {
    "rank": (lambda c: {"q": c["q"][None]}, r"q: wanted a tensor \[T, heads, head_dim\], got \[1, 9, 4, 32\]; pack"),
    "no tensor": (lambda c: {"v": c["v"].numpy()}, r"v: wanted a tensor .*, got ndarray"),
    "tokens": (lambda c: {"k": c["k"][:5]}, r"k: wanted \[9, 2, 32\], to fit q \[9, 4, 32\], got \[5, 2, 32\]; give"),
    "v alone": (lambda c: {"v": c["v"][:, :1]}, r"v: wanted \[9, 2, 32\], .* got \[9, 1, 32\]"),
    "head_dim": (lambda c: {"k": c["k"][..., :16], "v": c["v"][..., :16]}, r"k: wanted \[9, 2, 32\]"),
    "head_dim 0": (each(lambda x: x[..., :0]), r"q: wanted at least 1 head of at least 1 number, got \[9, 4, 0\]"),
    "no heads": (lambda c: {"q": c["q"][:, :0]}, r"q: wanted at least 1 head .*, got \[9, 0, 32\]"),
    "groups": (lambda c: {"q": c["q"][:, :3]}, "q: wanted a multiple of the 2 KV heads as query heads, got 3"),
    "plan": (lambda c: {"k": c["q"], "v": c["q"]}, "k: wanted 2 KV heads, as the plan has, got 4; use the plan"),
    "integers": (each(lambda x: x.long()), "q: wanted float32, bfloat16, .*, got torch.int64; convert"),
    "complex": (each(lambda x: x.to(torch.complex64)), "q: wanted float32, .*, got torch.complex64"),
    "8 bit": (each(lambda x: x.to(torch.float8_e4m3fn)), "q: wanted float32, .*, got torch.float8_e4m3fn"),
    "dtypes": (lambda c: {"v": c["v"].double()}, "v: wanted torch.float32, as q is, got torch.float64; convert"),
    "devices": (lambda c: {"k": c["k"].to("meta")}, "k: wanted device cpu, where q is, got meta; move"),
    "held dtype": (each(lambda x: x.double()), "k: wanted head_dim 32, torch.float32 on cpu, as layer 0 holds .*float64"),
    "held size": (each(lambda x: x[..., :16]), "k: wanted head_dim 32, torch.float32 .*, got head_dim 16, .*; use new"),
    "held device": (lambda c: each(lambda x: x.to("meta"))(c) | {"sinks": None}, "k: wanted .* on cpu, as layer 0 .*meta"),
    "sinks": (lambda c: {"sinks": torch.zeros(2)}, r"sinks: wanted one learned sink per query head, \[4\], got \[2\]"),
    "sinks listed": (lambda c: {"sinks": [0.0] * 4}, r"sinks: wanted one learned sink per query head, \[4\], got list; give"),
    "sink device": (each(lambda x: x.to("meta")), "sinks: wanted floating point on meta, .* on cpu; convert"),
    "sink kind": (lambda c: {"sinks": torch.zeros(4).long()}, "sinks: wanted floating point on cpu, .* got torch.int64"),
    "scale": (lambda c: {"scale": float("nan")}, "scale: wanted a finite number, got nan; leave it out"),
    "scale text": (lambda c: {"scale": "1"}, "scale: wanted a finite number, got 1; leave it out"),
    "softcap text": (lambda c: {"softcap": "1"}, "softcap: wanted a finite number above 0, got 1; leave it out"),
    "softcap": (lambda c: {"softcap": 0.0}, "softcap: wanted a finite number above 0, got 0.0; leave it out"),
    "layer": (lambda c: {"layer": 2}, "layer: wanted 0 to 1, the layers of the plan, got 2; use the plan"),
    "layer -1": (lambda c: {"layer": -1}, "layer: wanted 0 to 1, .*, got -1"),
    "layer name": (lambda c: {"layer": "0"}, "layer: wanted 0 to 1"),
    "memory": (lambda c: {"kv": {}}, "kv: wanted KV memory, got dict; make it with new_memory"),
    "batch": (lambda c: {"batch": [(0, 0, 6, 40)]}, "batch: wanted a Batch, got list; make it with Batch.pack"),
    "past the end": (slices((0, 0, 6, 40), (1, 8, 2, 40)), "batch: wanted slices within the 9 .*, got .* ends at 10"),
    "unknown": (slices((0, 0, 6, 40), (7, 8, 1, 40)), r"sequence 7 is not held; add\(\) it first"),
    "back": (slices((0, 0, 6, 40), (1, 8, 1, 39)), "batch: sequence 1 has 40 tokens in layer 0, .* at position 39; give"),
    "skip": (slices((0, 0, 6, 41), (1, 8, 1, 40)), "batch: sequence 0 has 40 tokens in layer 0, .* at position 41"),
    "other layer": (lambda c: {"layer": 1}, "batch: sequence 0 has 0 tokens in layer 1, .* at position 40"),
}  # fmt: skip


# Refused before any backend is asked: a few cases show that for the one whose kernels are slow to interpret.
EVERYWHERE = [(case, backend) for backend in ("torch", "reference") for case in BAD]


@pytest.mark.parametrize(("case", "backend"), [*EVERYWHERE, ("held size", "triton"), ("back", "triton")])
def test_a_refused_call_changes_nothing_and_may_be_corrected(lab: SimpleNamespace, case: str, backend: str) -> None:
    spoil, message = BAD[case]
    kv, twin = memory(lab, backend), memory(lab, backend)
    call, before = step(lab, kv), state(kv)
    with pytest.raises(ValueError, match=message):
        attend(**call | spoil(call))
    assert state(kv) == before
    torch.testing.assert_close(attend(**call), attend(**call | {"kv": twin}), rtol=0, atol=0)
    assert state(kv) == state(twin) != before


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(0, 0, 0, 40)], "wanted at least 1 token in Slice.*tokens=0.*; leave out"),
        ([(0, 0, -2, 40)], "wanted at least 1 token in Slice"),
        ([(0, -1, 2, 40)], "wanted offset >= 0 and"),
        ([(0, 0, 2, -1)], "wanted offset >= 0 and 0 <= position"),
        ([(0, 0, 2, (1 << 40) - 1)], r"0 <= position < 2\*\*40"),
        ([(0, 0, 6, 40), (1, 5, 1, 40)], "begins inside another slice, which ends at 6; give"),
        ([(1, 5, 1, 40), (0, 0, 6, 40)], "begins inside another slice"),
        ([(0, 0, 6, 40), (0, 6, 1, 46)], "sequence 0 has two slices; give"),
        ([(0, 0, 1.0, 40)], "wanted ints in Slice"),
        ([(0, np.int64(0), 1, 40)], "wanted ints in Slice"),
    ],
)
def test_slices_that_are_no_step_make_no_batch(items: list[tuple[int, int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(tuple(Slice(*item) for item in items))


def test_memory_without_tokens_takes_another_format(lab: SimpleNamespace) -> None:
    kv = memory(lab, "torch")
    for sequence in range(2):
        kv.remove(sequence)
    kv.add(5)
    qkv = lab.make_qkv(3, HEADS, KV_HEADS, 16, 0, torch.float64)
    assert attend(*qkv, kv, 0, Batch.pack([(5, 3, 0)])).dtype == torch.float64


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every second number": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(2)[..., ::2],
    "numbers outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "heads outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "tokens last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}
PLACES = [(layout, backend) for backend in ("torch", "reference") for layout in LAYOUTS]


@pytest.mark.parametrize(("layout", "backend"), [*PLACES, ("heads outermost", "triton")])
@pytest.mark.parametrize("tokens", [1, 30], ids=["decode", "prefill"])
def test_any_strides_give_the_result_of_contiguous_tensors(
    lab: SimpleNamespace, layout: str, backend: str, tokens: int
) -> None:
    plain, results = lab.make_qkv(tokens, HEADS, KV_HEADS, SIZE, 3), []
    for qkv in (plain, [LAYOUTS[layout](x) for x in plain]):
        kv = memory(lab, backend)
        results.append(attend(*qkv, kv, 0, Batch.pack([(0, tokens, 40)]), return_lse=True))
        after = lab.make_qkv(1, HEADS, KV_HEADS, SIZE, 4)
        results[-1] += (attend(*after, kv, 0, Batch.pack([(0, 1, 40 + tokens)])),)
    torch.testing.assert_close(*results)


def test_heads_expanded_without_a_copy_are_like_copies(lab: SimpleNamespace) -> None:
    q, k, v = lab.make_qkv(9, HEADS, 1, SIZE, 3)
    shared, outs = [q, k.expand(9, KV_HEADS, SIZE), v.expand(9, KV_HEADS, SIZE)], []
    for qkv in (shared, [x.clone() for x in shared]):
        outs.append(attend(*qkv, memory(lab, "torch"), 0, Batch.pack([(0, 9, 40)])))
    torch.testing.assert_close(*outs, rtol=0, atol=0)


ONE = [(where, backend) for backend in ("torch", "reference") for where in "qkv"]


@pytest.mark.parametrize(("where", "backend"), [*ONE, ("qkv", "triton")])
def test_nan_stays_in_its_own_sequence(lab: SimpleNamespace, where: str, backend: str) -> None:
    """Beside it in a step, as padding, in later steps, and in a sequence that comes after it."""
    kv, clean = memory(lab, backend), memory(lab, backend)
    for tokens, position in ((6, 40), (1, 46)):
        good, bad = lab.make_qkv(tokens, HEADS, KV_HEADS, SIZE, position), lab.make_qkv(6, HEADS, KV_HEADS, SIZE, 1)
        for name in where:
            bad["qkv".index(name)].fill_(torch.nan)
        q, k, v = (torch.cat([b[:5], g, b[5:]]) for b, g in zip(bad, good, strict=True))  # the last: padding
        past = kv.length(1)
        batch = Batch((Slice(1, 0, 5, past), Slice(0, 5, tokens, position)))
        out, lse = attend(q, k, v, kv, 0, batch, return_lse=True)
        want = attend(*good, clean, 0, Batch.pack([(0, tokens, position)]), return_lse=True)
        torch.testing.assert_close((out[5 : 5 + tokens], lse[5 : 5 + tokens]), want)
        assert out[:5].isnan().all()
    kv.remove(1)
    kv.add(1)
    again = lab.run_steps(kv, lab.make_qkv(34, HEADS, KV_HEADS, SIZE, 9), [30, 1, 1, 2], sequence=1)
    assert again.isfinite().all()


def test_backends_get_numbers_of_a_head_side_by_side(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kv, strides = memory(lab, "torch"), []
    backend = BACKENDS["torch"]

    def spy(*call: Any) -> object:
        strides.extend(x.stride(2) for x in call[:3])
        return backend.attend(*call)

    monkeypatch.setitem(BACKENDS, "torch", replace(backend, attend=spy))
    for call in (step(lab, kv), step(lab, kv) | {"batch": Batch.pack([(0, 9, 46)])}):
        attend(**call | each(lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0))(call))
    assert strides == [1] * 6
