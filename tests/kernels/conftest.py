"""What the kernel tests share: random steps, a memory filled with NaN, and an oracle that loops over keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory
from moa.kernels.memory import KVMemory
from moa.kernels.reference import reference_attention
from moa.kernels.storage import Storage
from moa.spans import ElasticRule, LengthMode, SpanRules


def make_rules(
    pairs: Sequence[Sequence[tuple[int, float]]], sink: int = 4, least: int = 8, mode: LengthMode = "running"
) -> SpanRules:
    """Span rules [L, HKV] from (alpha, beta) pairs."""
    rules = [[ElasticRule(*pair) for pair in layer] for layer in pairs]
    return SpanRules(
        alpha=np.array([[r.alpha for r in layer] for layer in rules], dtype=np.int64),
        beta_fixed=np.array([[r.beta_fixed for r in layer] for layer in rules], dtype=np.int64),
        sink_tokens=sink,
        min_span_tokens=least,
        length_mode=mode,
    )


def make_qkv(
    tokens: int, heads: int, kv_heads: int, size: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q [T, HQ, D], k and v [T, HKV, D]; scores are sharp enough that one wrong key shows."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, h, size, generator=generator) for h in (heads, kv_heads, kv_heads))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run_steps(
    kv: KVMemory,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    chunks: Sequence[int],
    sequence: int = 0,
    layer: int = 0,
    **scores: object,
) -> torch.Tensor:
    """Feed one sequence in chunks; all outputs [T, HQ, D]."""
    outs, start = [], kv.length(sequence, layer)
    for part in zip(*(x.split(list(chunks)) for x in qkv), strict=True):
        count = part[0].shape[0]
        outs.append(attend(*part, kv, layer, Batch.pack([(sequence, count, start)]), **scores))
        start += count
    return torch.cat(outs)


def attend_all(kv: KVMemory, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed one sequence at once: the output [T, HQ, D] and the log-sum-exp [T, HQ]."""
    return attend(*qkv, kv, 0, Batch.pack([(0, qkv[0].shape[0], 0)]), return_lse=True)


def oracle(
    rules: SpanRules,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layer: int = 0,
    pinned: int | None = None,
    native: int | None = None,
    **scores: object,
) -> torch.Tensor:
    """The whole sequence at once, float64, explicit mask."""
    positions = np.arange(qkv[0].shape[0], dtype=np.int64)
    starts = torch.from_numpy(rules.window_start(positions, pinned)[layer])
    q, k, v = (x.double() for x in qkv)
    out, _ = reference_attention(
        q, k, v, torch.from_numpy(positions), starts, rules.sink_tokens, native_window=native, **scores
    )
    return out


def new_torch_memory(rules: SpanRules, pinned: int | None = None, native: int | None = None) -> KVMemory:
    """Torch memory with sequence 0 admitted."""
    kv = new_memory("torch", rules, [native] * rules.alpha.shape[0])
    kv.add(0, pinned)
    return kv


@pytest.fixture(scope="module", autouse=True)
def poisoned_storage() -> Iterator[None]:
    """All KV storage starts as NaN, so that reading a slot never written shows."""
    make = Storage.__init__

    def poison(self: Storage, *args: object) -> None:
        make(self, *args)
        self.data.fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "__init__", poison)
        yield


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The helpers above; tests are no packages, so a fixture carries them."""
    helpers = (make_rules, make_qkv, run_steps, attend_all, oracle, new_torch_memory)
    return SimpleNamespace(**{helper.__name__: helper for helper in helpers})
