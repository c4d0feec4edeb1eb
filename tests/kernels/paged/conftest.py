"""Random steps and rules for the planner's tests; for the kernels', pages made by hand in a pool that is otherwise NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moa.kernels.layout import SpanTable
from moa.kernels.paged import backend, pool
from moa.kernels.paged.launch import Call, Heads, Pools
from moa.kernels.paged.splits import HeadRules, Step
from moa.kernels.reference import reference_attention
from moa.kernels.scores import Scores
from moa.spans import BETA_ONE, MAX_TOKENS, SpanRules

PAGE = 64


def make_heads(rng: np.random.Generator, layers: int, kv_heads: int, sink: int = 64) -> HeadRules:
    """Published kind of rules, dense ones and short windows among them; some with the model's own window."""
    n = int(rng.integers(1, 9))
    alpha = rng.choice([-1024, -100, 0, 64, 300, 1024, 8192], n)
    beta = rng.choice([0, 1, BETA_ONE // 8, BETA_ONE // 2, BETA_ONE], n)
    native = rng.choice([MAX_TOKENS, MAX_TOKENS, 1, 100, 4096], n)
    rule_of_head = rng.integers(0, n, (layers, kv_heads)).astype(np.int32)
    return HeadRules(
        np.stack((alpha, beta, native), 1).astype(np.int64), rule_of_head, sink, sink + int(rng.integers(1, 100))
    )


def make_step(rng: np.random.Generator, n_slices: int, group: int, most_tokens: int, longest: int = 1 << 17) -> Step:
    """Slices of 0 to `most_tokens` tokens after 0 to `longest` cached ones; some pinned."""
    tokens = rng.integers(0, most_tokens + 1, n_slices)
    position = np.floor(longest ** rng.uniform(0, 1, n_slices)) - 1
    pinned = np.where(rng.random(n_slices) < 0.3, position + tokens + rng.integers(1, 999, n_slices), 0)
    offset = np.cumsum(tokens) - tokens
    slices = np.stack((offset, tokens, position, np.arange(n_slices)), 1).astype(np.int32)
    return Step(slices, pinned.astype(np.int64), group)


@pytest.fixture(scope="session")
def steps() -> SimpleNamespace:
    """The helpers above; tests are no packages, so a fixture carries them."""
    return SimpleNamespace(make_heads=make_heads, make_step=make_step)


@dataclass
class Case:
    """Sequences (cached, new tokens) of one layer, each in a slice; `order` permutes the slices' places in the step."""

    rules: SpanRules
    sequences: Sequence[tuple[int, int]]
    group: int = 2
    size: int = 16
    dtype: torch.dtype = torch.float32
    pinned: Sequence[int] | None = None
    native: int | None = None
    softcap: float | None = None
    learned: bool = False
    seed: int = 0
    gap: int = 3  # tokens of the step in no slice

    @property
    def heads(self) -> int:
        return self.rules.alpha.shape[1]

    def scores(self) -> Scores:
        """Scores with learned sinks, if the case has them."""
        generator = torch.Generator().manual_seed(self.seed + 99)
        sinks = 2 * torch.randn(self.heads * self.group, generator=generator) if self.learned else None
        return Scores(self.size**-0.5, self.softcap, sinks)

    def texts(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q [N, HQ, D], k and v [N, HKV, D] of every sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            tuple(
                torch.randn(sum(n), h, self.size, generator=generator).to(self.dtype)
                for h in (self.heads * self.group, self.heads, self.heads)
            )
            for n in self.sequences
        ]


def build(case: Case) -> Call:
    """Everything a kernel reads: survivors of the cached tokens in pages, all else NaN."""
    generator = np.random.default_rng(case.seed)
    spans = SpanTable(case.rules, [case.native])
    texts, HKV, D = case.texts(), case.heads, case.size
    width = max(-(-sum(n) // PAGE) for n in case.sequences) + 1
    count = len(texts) * HKV * width + 1
    keys = torch.full((count, PAGE, D), float("nan"), dtype=case.dtype)
    values = keys.clone()
    free = generator.permutation(count - 1).tolist()
    table = np.full((len(texts), HKV, width), count - 1, dtype=np.int32)  # the last page stays NaN
    slices, offset = [], case.gap
    for slot, ((cached, tokens), (_, k, v)) in enumerate(zip(case.sequences, texts, strict=True)):
        slices.append((offset, tokens, cached, slot))
        offset += tokens
        for h in range(HKV if cached else 0):
            start = spans.starts(cached - 1, 1, case.pinned and case.pinned[slot])[spans.rule_of_head[0, h], 0]
            for j in (j for j in range(cached) if j < case.rules.sink_tokens or j >= start):
                if table[slot, h, j // PAGE] == count - 1:
                    table[slot, h, j // PAGE] = free.pop()
                page = table[slot, h, j // PAGE]
                keys[page, j % PAGE], values[page, j % PAGE] = k[j, h], v[j, h]
    packed = [torch.full((offset + case.gap, x.shape[1], D), float("nan"), dtype=case.dtype) for x in texts[0]]
    for (at, tokens, cached, _), text in zip(slices, texts, strict=True):
        for x, y in zip(packed, text, strict=True):
            x[at : at + tokens] = y[cached:]
    out = torch.full_like(packed[0], float("nan"))
    return Call(
        *packed,
        out=out,
        lse=torch.full(out.shape[:2], float("nan")),
        pools=Pools(keys, values),
        table=torch.from_numpy(table),
        slices=torch.tensor(slices, dtype=torch.int32),
        pinned=torch.tensor([case.rules.pinned_length(n) for n in case.pinned or []] or [0] * len(texts)),
        heads=Heads(
            torch.from_numpy(spans.rules),
            torch.from_numpy(spans.rule_of_head.astype(np.int32)),
            case.rules.sink_tokens,
            case.rules.min_span_tokens,
        ),
        layer=0,
        scores=case.scores(),
    )


def expected(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and log-sum-exp of each slice in float64, from all keys."""
    results = []
    for i, ((cached, tokens), text) in enumerate(zip(case.sequences, case.texts(), strict=True)):
        positions = np.arange(cached, cached + tokens, dtype=np.int64)
        starts = case.rules.window_start(positions, case.pinned and case.pinned[i])[0]
        q, k, v = (x.double() for x in text)
        scores = case.scores()
        sinks = None if scores.sinks is None else scores.sinks.double()
        results.append(
            reference_attention(
                q[cached:], k, v, torch.from_numpy(positions), torch.from_numpy(starts), case.rules.sink_tokens,
                scale=scores.scale, softcap=scores.softcap, sinks=sinks, native_window=case.native,
            )
        )  # fmt: skip
    return results


def work_of(case: Case, rows: int, shares: Sequence[int] = ()) -> torch.Tensor:
    """All tiles of all slices and heads, each cut at the units `shares`; last tiles first."""
    entries, slot = [], 0
    cuts = [0, *sorted(shares), 1 << 30]
    for i, (_, tokens) in enumerate(case.sequences):
        for first in reversed(range(0, tokens * case.group, rows)):
            for h in range(case.heads):
                for a, b in pairwise(cuts):
                    place = slot if shares else -1
                    entries.append((i, h, first, min(rows, tokens * case.group - first), a, b, place, len(shares) + 1))
                    slot += 1
    return torch.tensor([*entries, (0,) * 8], dtype=torch.int32)  # with one entry of padding


def check(case: Case, call: Call, atol: float) -> None:
    """Outputs of all slices are right, and nothing else was written."""
    touched = torch.zeros(call.out.shape[0], dtype=torch.bool)
    for (at, tokens, _, _), (out, lse) in zip(call.slices.tolist(), expected(case), strict=True):
        torch.testing.assert_close(call.out[at : at + tokens].double(), out, atol=atol, rtol=atol)
        torch.testing.assert_close(call.lse[at : at + tokens].double(), lse, atol=max(atol / 10, 1e-5), rtol=1e-5)
        touched[at : at + tokens] = True
    assert call.out[~touched].isnan().all()
    assert call.lse[~touched].isnan().all()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory as torch.empty may give it, at its worst."""
    with torch.inference_mode(False):
        return torch.full(shape, float("nan") if dtype.is_floating_point else -128, dtype=dtype, device=device)


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Pages, partial results and outputs start as NaN, so that reading what was never written shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_empty", poisoned)
        patch.setattr(backend, "_scratch", poisoned)
        yield


@pytest.fixture(scope="session")
def paged() -> SimpleNamespace:
    """The helpers above; tests are no packages, so a fixture carries them."""
    return SimpleNamespace(Case=Case, build=build, expected=expected, work_of=work_of, check=check)
