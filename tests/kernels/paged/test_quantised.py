"""INT8 and FP8 pages: codes as the reference makes them, attention over what they stand for, sinks in full."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.paged.pool import CODES
from moa.kernels.paged.quantise import LEAST_SCALE, dequantise, quantise
from moa.kernels.reference import reference_attention

ERROR = {"int8": 0.5 / 127, "fp8": 2.0**-4}  # of a row's largest number; E4M3 keeps 3 bits behind the first


@given(
    values=st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=9), kind=st.sampled_from(list(CODES))
)
def test_codes_stand_for_their_numbers(values: list[float], kind: str) -> None:
    x = torch.tensor([values])
    codes, scale = quantise(x, CODES[kind])
    error = (dequantise(codes, scale) - x).abs().max()
    assert error <= ERROR[kind] * 1.001 * x.abs().max() + 448 * LEAST_SCALE


def stored(kv: PagedMemory, layer_head: int, page: int) -> list[torch.Tensor]:
    """Codes and scales of keys and of values in the page of a sequence's `page`-th 64 tokens."""
    arena = kv.arenas[0]
    at = arena.table.entries[0, layer_head, page]
    codes = arena.pools.codes
    assert codes is not None
    return [x[at] for x in codes]


@pytest.mark.parametrize("kind", list(CODES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_append_writes_the_codes_of_the_reference(lab: SimpleNamespace, kind: str, dtype: torch.dtype) -> None:
    kv = PagedMemory(lab.make_rules([[(0, 1.0), (80, 0.0)]], 4, 8), kv_dtype=kind)
    kv.add(0)
    q, k, v = lab.make_qkv(150, 2, 2, 20, 0, dtype)
    k[:, :, 3] *= 40  # an outlier, as keys have them
    k[70] = 0
    lab.run_steps(kv, (q, k, v), [67, 83])
    pool = kv.arenas[0].pool
    for head in range(2):
        sink = kv.arenas[0].table.entries[0, head, 0]
        assert torch.equal(pool.keys[sink, :4], k[:4, head])
        assert torch.equal(pool.values[sink, :4], v[:4, head])
        for page, first, last in ((1, (64, 74)[head], 128), (2, 128, 150)):  # the window of the second is [74, 150)
            found = stored(kv, head, page)
            for x, codes, scales in ((k, *found[::2]), (v, *found[1::2])):
                want, scale = quantise(x[first:last, head], CODES[kind])
                here = slice(first - 64 * page, last - 64 * page)
                torch.testing.assert_close(scales[here], scale, atol=0, rtol=1e-6)
                off = codes[here].float() != want.float()  # a scale's last bit moves a number over a tie now and then
                assert off.float().mean() < 0.01


@pytest.mark.parametrize("kind", list(CODES))
@pytest.mark.parametrize(
    ("sinks", "dtype", "bound"),
    [(4, torch.float32, 1e-5), (70, torch.float32, 1e-5), (4, torch.bfloat16, 3e-2)],
    ids=str,
)
def test_attention_is_over_what_the_codes_stand_for(
    lab: SimpleNamespace, kind: str, sinks: int, dtype: torch.dtype, bound: float
) -> None:
    """Decodes and a chunk after 150 tokens: cached keys beyond the pages of the sinks count as their codes say."""
    rules, plain = lab.make_rules([[(0, 0.6), (80, 0.0)]], sinks, sinks + 4), 64 * -(-sinks // 64)
    kv = PagedMemory(rules, kv_dtype=kind)
    kv.add(0)
    q, k, v = lab.make_qkv(158, 4, 2, 16, 1, dtype)
    lab.run_steps(kv, [x[:150] for x in (q, k, v)], [150])
    for start, count in ((150, 1), (151, 7)):
        keys, values = k.double(), v.double()
        keys[plain:start], values[plain:start] = (
            dequantise(*quantise(x[plain:start], CODES[kind])).double() for x in (k, v)
        )
        part = slice(start, start + count)
        positions = np.arange(start, start + count, dtype=np.int64)
        want, _ = reference_attention(
            q[part].double(), keys, values, torch.from_numpy(positions),
            torch.from_numpy(rules.window_start(positions)[0]), sinks,
        )  # fmt: skip
        out = lab.run_steps(kv, [x[part] for x in (q, k, v)], [count])
        torch.testing.assert_close(out.double(), want, atol=bound, rtol=bound)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of what is meant here
@pytest.mark.parametrize("kind", list(CODES))
def test_numbers_that_are_none_stay_in_their_sequence(lab: SimpleNamespace, kind: str) -> None:
    rules = lab.make_rules([[(0, 1.0)]], 0, 4)
    kv = PagedMemory(rules, kv_dtype=kind)
    good, bad = lab.make_qkv(70, 1, 1, 16, 0), lab.make_qkv(70, 1, 1, 16, 1)
    bad[1][5, 0, 3] = torch.nan
    bad[2][6, 0, 3] = torch.inf
    for i, qkv in enumerate((good, bad)):
        kv.add(i)
        lab.run_steps(kv, [x[:69] for x in qkv], [69], sequence=i)
    alone = PagedMemory(rules, kv_dtype=kind)
    alone.add(0)
    lab.run_steps(alone, [x[:69] for x in good], [69])
    want = lab.run_steps(alone, [x[69:] for x in good], [1])
    packed = [torch.cat((b[69:], a[69:])) for a, b in zip(good, bad, strict=True)]
    out = attend(*packed, kv, 0, Batch.pack([(1, 1, 69), (0, 1, 69)]))
    assert not out[0].isfinite().all()
    torch.testing.assert_close(out[1:], want)


def test_quantised_pages_take_fewer_bytes(lab: SimpleNamespace) -> None:
    """A page of sinks in float32 and two of codes with their scales, of one head each."""
    kv = PagedMemory(lab.make_rules([[(0, 1.0)]], 4, 8), kv_dtype="int8")
    kv.add(0)
    arena, step = kv.step(0, torch.zeros(150, 1, 20), Batch.pack([(0, 150, 0)]))
    kv.finish(0, arena, step)
    assert kv.kv_bytes == 2 * 64 * (20 * 4) + 2 * 2 * 64 * (20 + 4)
