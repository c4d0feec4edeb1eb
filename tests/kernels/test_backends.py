"""Any history of any plan: sequences come, run in mixed steps, are copied as beams and go, equal in every backend.

The reference runs in float64 on the inputs that the others get, so what differs is what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moa.kernels.banded
import moa.kernels.storage
from moa.kernels.batch import Batch, Slice
from moa.kernels.dispatch import attend, new_memory

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
PAIRS = st.tuples(st.sampled_from([-20, 0, 3, 10, 50]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
# Numbers name sequences by their place among those alive, whatever came before: so every list of events has a meaning.
PLACE = st.integers(0, 5)


def steps(sizes: Sequence[int]) -> st.SearchStrategy[Any]:
    """A step: (place, tokens, padding before them) per sequence, and the order in which its slices are named."""
    parts = st.lists(st.tuples(PLACE, st.sampled_from(sizes), st.sampled_from([0, 0, 0, 2])), min_size=1, max_size=4)
    return st.tuples(st.just("step"), parts, st.sampled_from([1, -1]))


def events(sizes: Sequence[int], count: int) -> st.SearchStrategy[Any]:
    """What happens to the sequences of a memory."""
    arrival = st.tuples(st.just("arrive"), st.sampled_from([1, 7, 40, 300]))  # the length for pinned plans
    leave = st.tuples(st.just("leave"), PLACE)
    select = st.tuples(st.just("select"), st.lists(PLACE, min_size=2, max_size=4))
    step = steps(sizes)
    return st.lists(st.one_of(step, arrival, step, select, step, leave), min_size=count // 2, max_size=count)


@st.composite
def cases(
    draw: st.DrawFn, sizes: Sequence[int], count: int, dtypes: Sequence[torch.dtype] = tuple(TOLERANCE)
) -> SimpleNamespace:
    """A model's shapes, a plan for it, and a history of up to `count` events."""
    layers, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sink = draw(st.sampled_from([0, 1, 4, 7]))
    return SimpleNamespace(
        pairs=[[draw(PAIRS) for _ in range(kv_heads)] for _ in range(layers)],
        sink=sink,
        least=sink + draw(st.sampled_from([1, 2, 5, 30])),
        mode=draw(st.sampled_from(["running", "pinned"])),
        natives=[draw(st.sampled_from([None, None, 1, 5, 40])) for _ in range(layers)],
        heads=kv_heads * draw(st.sampled_from([1, 2, 4, 7])),
        size=draw(st.sampled_from([16, 64, 80])),
        dtype=draw(st.sampled_from(dtypes)),
        softcap=draw(st.sampled_from([None, None, 1.0, 30.0])),
        has_sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        paged=draw(st.booleans()),
        way=draw(st.sampled_from(["tiles", "flash", "masks"])),  # of the torch backend, whatever the processor has
        events=draw(events(sizes, count)),
    )


class History:
    """Plays events on one memory per backend, and compares all with the reference after every step."""

    def __init__(self, lab: SimpleNamespace, case: SimpleNamespace, backends: Sequence[str]) -> None:
        rules = lab.make_rules(case.pairs, case.sink, case.least, case.mode)
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        self.memories = {name: new_memory(name, rules, case.natives) for name in ("reference", *backends)}
        self.live: list[int] = []

    def play(self) -> None:
        """All events, then the end of all sequences, on the case's kind of storage."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moa.kernels.storage, "LEAST_PAGES", 0 if self.case.paged else 1 << 40)
            if self.case.way == "flash":
                patch.setattr(moa.kernels.banded, "tiles_run", lambda q: False)
            self._play()

    def _play(self) -> None:
        self.arrive(300)
        for name, *arguments in self.case.events:
            getattr(self, name)(*arguments)
        while self.live:
            self.leave(0)
        assert {name: kv.kv_bytes for name, kv in self.memories.items()} == dict.fromkeys(self.memories, 0)

    def arrive(self, pinned: int) -> None:
        """Ids are taken again, as those of engines are."""
        sequence = min(set(range(len(self.live) + 1)) - set(self.live))
        for kv in self.memories.values():
            kv.add(sequence, pinned)
        self.live.append(sequence)

    def leave(self, place: int) -> None:
        """One sequence goes, if there is one."""
        if self.live:
            sequence = self.live.pop(place % len(self.live))
            for kv in self.memories.values():
                kv.remove(sequence)

    def select(self, places: Sequence[int]) -> None:
        """Beams: some sequences are doubled, some are dropped."""
        if self.live:
            sources = [self.live[place % len(self.live)] for place in places]
            for kv in self.memories.values():
                kv.select(sources)
            self.live = list(range(len(sources)))

    def step(self, parts: Sequence[tuple[int, int, int]], order: int) -> None:
        """One forward step through all layers."""
        slices, end, reference = {}, 0, self.memories["reference"]
        for place, tokens, padding in parts:
            sequence = self.live[place % len(self.live)] if self.live else None
            if sequence is not None and sequence not in slices:
                slices[sequence] = Slice(sequence, end + padding, tokens, reference.length(sequence))
                end += padding + tokens
        batch = Batch(tuple([*slices.values()][::order]))
        for layer in range(len(self.case.pairs)):
            self.attend(layer, batch, end + parts[0][2])

    def attend(self, layer: int, batch: Batch, tokens: int) -> None:
        """One layer; what padding holds must not matter."""
        heads, size, dtype = self.case.heads, self.case.size, self.case.dtype
        kv_heads = len(self.case.pairs[0])
        real = torch.zeros(tokens, 1, 1, dtype=torch.bool)
        for item in batch.slices:
            real[item.offset : item.offset + item.tokens] = True
        shapes = [(tokens, count, size) for count in (heads, kv_heads, kv_heads)]
        qkv = [torch.randn(shape, generator=self.generator).to(dtype).where(real, torch.nan) for shape in shapes]
        sinks = torch.randn(heads, generator=self.generator).to(dtype) if self.case.has_sinks else None
        options = {"softcap": self.case.softcap, "return_lse": True}
        doubles = {"q": qkv[0].double(), "k": qkv[1].double(), "v": qkv[2].double()}
        exact = None if sinks is None else sinks.double()
        want = attend(**doubles, kv=self.memories["reference"], layer=layer, batch=batch, sinks=exact, **options)
        assert not any(x.isnan().any() for x in want)
        for name, kv in self.memories.items():
            if name != "reference":
                q = qkv[0].clone().requires_grad_(self.case.way == "masks")
                out, lse = attend(q, *qkv[1:], kv, layer, batch, sinks=sinks, **options)
                self.compare(name, (out.detach(), lse.detach()), want)
                assert kv.lengths(self.live, layer) == self.memories["reference"].lengths(self.live, layer)

    def compare(self, name: str, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
        """Output and log-sum-exp, in the dtypes promised."""
        dtype = self.case.dtype
        assert [x.dtype for x in got] == [dtype, torch.float64 if dtype == torch.float64 else torch.float32]
        for what, ours, exact in zip(("output", "log-sum-exp"), got, want, strict=True):
            bound = TOLERANCE[dtype]
            torch.testing.assert_close(
                ours.double(), exact, atol=bound, rtol=bound, msg=lambda m, w=what: f"{w} of {name}: {m}"
            )


TORCH = cases([1, 1, 1, 2, 5, 17, 64, 130, 300], 16)
# The interpreter takes some 5 ms for a tile of 64 keys, and Triton has no float64.
TRITON = cases([1, 1, 2, 5, 17, 64, 70], 6, [torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=60)
@given(case=TORCH)
def test_torch_computes_the_reference(lab: SimpleNamespace, case: SimpleNamespace) -> None:
    History(lab, case, ["torch"]).play()


@settings(max_examples=10)
@given(case=TRITON)
def test_triton_computes_the_reference(lab: SimpleNamespace, case: SimpleNamespace) -> None:
    History(lab, case, ["triton"]).play()


@pytest.mark.nightly
@settings(max_examples=3000)
@given(case=TORCH)
def test_torch_computes_the_reference_in_thousands_of_histories(lab: SimpleNamespace, case: SimpleNamespace) -> None:
    History(lab, case, ["torch"]).play()


@pytest.mark.nightly
@settings(max_examples=500)
@given(case=TRITON)
def test_triton_computes_the_reference_in_hundreds_of_histories(lab: SimpleNamespace, case: SimpleNamespace) -> None:
    History(lab, case, ["triton", "torch"]).play()
