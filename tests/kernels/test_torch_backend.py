"""The torch backend against the oracle: any size, any chunking, any company."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moa.kernels.banded
import moa.kernels.scores
import moa.kernels.storage
import moa.kernels.store
from moa.errors import UsageError
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory
from moa.kernels.layout import SpanTable

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
UGLY = [1, 2, 31, 127, 128, 129, 257, 331]
PAIRS = st.tuples(st.sampled_from([-20, 0, 10, 50]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    """A plan, a length, and a way to cut it into steps."""
    tokens, kv_heads = draw(st.sampled_from(UGLY)), draw(st.integers(1, 3))
    sink = draw(st.sampled_from([0, 1, 4, 7]))
    mode = draw(st.sampled_from(["running", "pinned"]))
    chunks, left = [], tokens
    while left:
        chunks.append(min(left, draw(st.sampled_from([1, 1, 2, 5, 64, 130, 300]))))
        left -= chunks[-1]
    return SimpleNamespace(
        pairs=[[draw(PAIRS) for _ in range(kv_heads)]],
        sink=sink,
        least=sink + draw(st.sampled_from([1, 2, 5, 30])),
        mode=mode,
        pinned=draw(st.sampled_from([1, tokens, tokens // 2 + 1, 2 * tokens])) if mode == "pinned" else None,
        native=draw(st.sampled_from([None, None, 1, 5, 40, 150])),
        tokens=tokens,
        chunks=chunks,
        heads=kv_heads * draw(st.sampled_from([1, 2, 7])),
        kv_heads=kv_heads,
        size=draw(st.sampled_from([32, 64, 80])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        seed=draw(st.integers(0, 1000)),
        softcap=draw(st.sampled_from([None, None, 1.0, 30.0])),
        has_sinks=draw(st.booleans()),
        tiles=draw(st.booleans()),
        paged=draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_equals_the_oracle_and_stores_exactly_the_span(lab: SimpleNamespace, case: SimpleNamespace) -> None:
    rules = lab.make_rules(case.pairs, case.sink, case.least, case.mode)
    qkv = lab.make_qkv(case.tokens, case.heads, case.kv_heads, case.size, case.seed, case.dtype)
    kv = lab.new_torch_memory(rules, case.pinned, case.native)
    generator = torch.Generator().manual_seed(case.seed)
    sinks = 2 * torch.randn(case.heads, generator=generator).to(case.dtype) if case.has_sinks else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moa.kernels.storage, "LEAST_PAGES", 0 if case.paged else 1 << 40)
        if not case.tiles:
            patch.setattr(moa.kernels.banded, "tiles_run", lambda q: False)
        out = lab.run_steps(kv, qkv, case.chunks, softcap=case.softcap, sinks=sinks)
    want = lab.oracle(rules, qkv, pinned=case.pinned, native=case.native, softcap=case.softcap, sinks=sinks)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    if case.native is None:
        span = rules.span(rules.pinned_length(case.pinned) if case.pinned else case.tokens)[0]
        assert kv.stored_tokens(0, 0) == np.minimum(span, case.tokens).tolist()
    assert all(store.is_paged == case.paged for store in kv.state(0).layers[0].stores)
    kv.remove(0)
    assert kv.kv_bytes == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_is_near_the_oracle(lab: SimpleNamespace, dtype: torch.dtype, tolerance: float) -> None:
    rules = lab.make_rules([[(0, 0.3), (40, 0.0)]])
    qkv = lab.make_qkv(300, 4, 2, 64, 3, dtype)
    out = lab.run_steps(lab.new_torch_memory(rules), qkv, [200, 1, 1, 97, 1])
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv), atol=tolerance, rtol=tolerance)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_sequences_packed_in_one_step_equal_each_alone(lab: SimpleNamespace, data: st.DataObject) -> None:
    rules = lab.make_rules([[(0, 0.5), (12, 0.0), (0, 0.5), (0, 1.0)]])
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 9, 40, 140]), min_size=2, max_size=4))
    inputs = [lab.make_qkv(n, 8, 4, 32, i) for i, n in enumerate(lengths)]
    alone = [lab.run_steps(lab.new_torch_memory(rules), qkv, [n]) for qkv, n in zip(inputs, lengths, strict=True)]
    kv, done, outs = new_memory("torch", rules), [0] * len(lengths), [[] for _ in lengths]
    for i in range(len(lengths)):
        kv.add(i)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        takes = [min(n - d, data.draw(st.sampled_from([0, 1, 7, 64]))) for d, n in zip(done, lengths, strict=True)]
        takes = [t or (d < n) for t, d, n in zip(takes, done, lengths, strict=True)]
        parts = [(i, int(t), done[i]) for i, t in enumerate(takes) if t]
        packed = [torch.cat([inputs[i][x][d : d + t] for i, t, d in parts]) for x in range(3)]
        batch = Batch.pack(parts)
        out = attend(*packed, kv, 0, batch)
        for item in batch.slices:
            outs[item.sequence].append(out[item.offset : item.offset + item.tokens])
            done[item.sequence] += item.tokens
    for got, want in zip(outs, alone, strict=True):
        torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)


def test_tokens_in_no_slice_are_zero(lab: SimpleNamespace) -> None:
    kv = lab.new_torch_memory(lab.make_rules([[(0, 1.0)]]))
    q, k, v = lab.make_qkv(6, 2, 1, 32, 0)
    batch = Batch(tuple(s._replace(offset=2) for s in Batch.pack([(0, 3, 0)]).slices))
    out = attend(q, k, v, kv, 0, batch)
    assert out[:2].eq(0).all()
    assert out[5:].eq(0).all()
    assert out[2:5].ne(0).all()


def shifted(by: int) -> Callable[[pytest.MonkeyPatch, Qkv], None]:
    """Windows begin `by` tokens later."""

    def change(patch: pytest.MonkeyPatch, qkv: Qkv) -> None:
        starts = SpanTable.starts
        patch.setattr(SpanTable, "starts", lambda *a: (found := starts(*a)) + by * (found > 4))

    return change


def without(position: int) -> Callable[[pytest.MonkeyPatch, Qkv], None]:
    """As if the key at a position were masked: its score is far below all others of the last query."""
    return lambda patch, qkv: qkv[1][position, 0].copy_(-50 * qkv[0][-1, 0].sign())


CHANGES = {
    "a key less": shifted(1),
    "a key more": shifted(-1),
    "no first key of the window": without(199 - 35),
    "no sink": without(2),
    "no key of its own": without(199),
}


@pytest.mark.parametrize("chunks", [[200], [160, 40], [199, 1]], ids=["prefill", "chunk", "decode"])
@pytest.mark.parametrize("way", ["tiles", "flash", "masks"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_key_too_few_or_too_many_is_seen(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, change: str, way: str, chunks: list[int]
) -> None:
    """The oracle comparisons above have teeth: each change moves the last token's output far beyond their tolerance."""
    rules, (q, k, v) = lab.make_rules([[(40, 0.0)]]), lab.make_qkv(200, 1, 1, 32, 0)
    want = lab.oracle(rules, (q, k, v))[-1]
    qkv = q, k.clone(), v
    CHANGES[change](monkeypatch, qkv)
    if way == "flash":
        monkeypatch.setattr(moa.kernels.banded, "tiles_run", lambda q: False)
    out = lab.run_steps(lab.new_torch_memory(rules), [x.requires_grad_(way == "masks") for x in qkv], chunks)
    assert (out[-1].detach() - want).abs().max() > 1e-2


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_gradients_reach_queries_keys_values_and_sinks(
    lab: SimpleNamespace, softcap: float | None, has_sinks: bool
) -> None:
    rules = lab.make_rules([[(20, 0.0), (0, 0.5)]])
    grads = []
    for run in (lambda *x, **s: lab.run_steps(lab.new_torch_memory(rules), *x, [150], **s), partial(lab.oracle, rules)):
        qkv = [x.requires_grad_() for x in lab.make_qkv(150, 4, 2, 32, 5, torch.float64)]
        sinks = torch.linspace(-2, 2, 4, dtype=torch.float64).requires_grad_() if has_sinks else None
        run(qkv, softcap=softcap, sinks=sinks).square().sum().backward()
        grads.append([x.grad for x in (*qkv, *([sinks] if has_sinks else []))])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("learns", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_a_single_token_has_gradients_whichever_of_q_k_v_learns(lab: SimpleNamespace, learns: tuple[int, ...]) -> None:
    rules = lab.make_rules([[(40, 0.0), (0, 1.0)]])
    grads = []
    for kind in ("torch", "reference"):
        past, token = (lab.make_qkv(n, 4, 2, 32, 5, torch.float64) for n in (90, 1))
        kv = new_memory(kind, rules)
        kv.add(0)
        attend(*past, kv, 0, Batch.pack([(0, 90, 0)]))
        token = [x.requires_grad_(bool(it)) for x, it in zip(token, learns, strict=True)]
        attend(*token, kv, 0, Batch.pack([(0, 1, 90)])).square().sum().backward()
        grads.append([x.grad for x in token if x.requires_grad])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("scores", [{"softcap": 2.0}, {"softcap": 2.0, "sinks": torch.ones(4)}], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_scores_that_no_stock_kernel_knows_take_tiles_of_bounded_size(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, scores: dict[str, object], grad: bool
) -> None:
    monkeypatch.setattr(moa.kernels.banded, "tiles_run", lambda q: False)
    rules, qkv = lab.make_rules([[(0, 1.0), (20, 0.0)]]), lab.make_qkv(300, 4, 2, 32, 1)
    want = lab.oracle(rules, qkv, **scores)
    tile, elements = moa.kernels.scores._attend_tile, []

    def counted(q: torch.Tensor, keys: torch.Tensor, *rest: object) -> torch.Tensor:
        elements.append(q.shape[:3].numel() * keys.shape[1])
        return tile(q, keys, *rest)

    monkeypatch.setattr(moa.kernels.scores, "TILE_ELEMENTS", 5000)
    monkeypatch.setattr(moa.kernels.scores, "_attend_tile", counted)
    out = lab.run_steps(lab.new_torch_memory(rules), [x.requires_grad_(grad) for x in qkv], [300], **scores)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    assert len(elements) > 10
    assert max(elements) <= 5000


def test_an_unknown_backend_names_the_closest(lab: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        new_memory("torhc", lab.make_rules([[(0, 1.0)]]))


@pytest.mark.parametrize("tiles", [False, True])
def test_the_path_that_ran_is_named(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tiles: bool) -> None:
    monkeypatch.setattr(moa.kernels.banded, "tiles_run", lambda q: tiles)
    rules, qkv = lab.make_rules([[(20, 0.0), (0, 1.0)]]), lab.make_qkv(60, 2, 2, 32, 0)
    kv, paths = lab.new_torch_memory(rules), []
    for a, b in ((0, 10), (10, 11), (11, 15), (15, 16), (16, 40), (40, 41)):
        lab.run_steps(kv, [x[a:b] for x in qkv], [b - a])
        paths.append(kv.path)
    chunk = "tiles" if tiles else "flash"
    # a text's first few tokens are never tiles
    assert paths[:4] == ["dense by flash", "dense by views", f"dense by {chunk}", "dense by views"]
    assert paths[4:] == [f"spans by {chunk}", "spans by views"]
    lab.run_steps(kv, [x[41:50].requires_grad_() for x in qkv], [9])
    assert kv.path == "spans by masks"
    assert len(kv.state(0).layers[0].stores) == 2


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 45, [10, *[1] * 13, 9, *[1] * 13]], ids=["tokens", "chunks"])
def test_sinks_that_moved_leave_a_native_window_one_by_one(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, chunks: list[int], tiles: bool
) -> None:
    """A window of 3 moves 7 sinks along for 20 tokens before the native window takes the first of them."""
    monkeypatch.setattr(moa.kernels.banded, "tiles_run", lambda q: tiles)
    rules, qkv = lab.make_rules([[(0, 0.0)]], sink=7, least=10), lab.make_qkv(45, 1, 1, 32, 0)
    kv = lab.new_torch_memory(rules, native=20)
    out = lab.run_steps(kv, qkv, chunks)
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv, native=20), atol=1e-5, rtol=1e-5)
    assert kv.stored_tokens(0, 0) == [3]


@pytest.mark.parametrize("pairs", [[(20, 0.0), (0, 0.1)], [(50, 0.0), (0, 0.5)]], ids=["slow", "fast"])
@pytest.mark.parametrize("after", ["chunk", "copy", "longer", "tokens"])
def test_tokens_that_took_the_place_of_others_are_put_in_order_for_who_asks(
    lab: SimpleNamespace, pairs: list[tuple[int, float]], after: str
) -> None:
    rules, qkv = lab.make_rules([pairs], sink=3, least=12), lab.make_qkv(160, 4, 2, 32, 1)
    kv = lab.new_torch_memory(rules)
    chunks = [30, *[1] * 77]
    out = lab.run_steps(kv, [x[:107] for x in qkv], chunks)
    assert kv.state(0).layers[0].stores[0]._oldest or kv.state(0).layers[0].stores[1]._oldest
    sequence = 0
    if after == "copy":
        kv.copy(0, 1)
        kv.remove(0)
        sequence = 1
    rest = {"chunk": [53], "longer": [2] * 26 + [1], "copy": [1, 52], "tokens": [1] * 53}[after]
    out = torch.cat([out, lab.run_steps(kv, [x[107:] for x in qkv], rest, sequence)])
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv), atol=1e-5, rtol=1e-5)
    assert kv.stored_tokens(sequence, 0) == rules.span(160)[0].tolist()


def test_a_long_window_is_not_turned(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moa.kernels.store, "MOST_REPLACED", 15)
    rules, qkv = lab.make_rules([[(20, 0.0)]], sink=4), lab.make_qkv(60, 2, 1, 32, 1)
    kv = lab.new_torch_memory(rules)
    out = lab.run_steps(kv, qkv, [1] * 60)
    torch.testing.assert_close(out.double(), lab.oracle(rules, qkv), atol=1e-5, rtol=1e-5)
    assert not kv.state(0).layers[0].stores[0]._oldest
