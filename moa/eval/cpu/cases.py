"""What `moa bench kernels --device cpu` measures: shapes, plans, and the calls whose times are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from moa.eval.cpu.flex import compiled_flex
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend
from moa.kernels.memory import TorchMemory
from moa.spans import BETA_ONE, SpanRules

# Shares of the length that KV heads keep; with running spans also the shares of causal pairs computed, near enough.
PLANS = {
    "12.5 %": (0.125, 0.125),
    "25 %": (0.25, 0.25),
    "two rules, 25 %": (0.125, 0.375),
    "50 %": (0.5, 0.5),
    "100 %": (1.0, 1.0),
}
FLEX_PLAN = "25 %"
DENSE, FLEX, OURS = "dense SDPA", "compiled flex_attention", "moa"
SINK_TOKENS, LEAST_SPAN = 64, 128
# A decode step is timed through so many layers, as in a model: each finds its keys, and the code, pushed out of the cache
# by the layer before, and what is done once per step is shared.
DECODE_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: queries of a whole text (prefill), or of one token behind `tokens` cached ones (decode)."""

    kind: Literal["prefill", "decode"]
    tokens: int
    dtype: str
    head_dim: int
    kv_heads: int
    group: int

    @property
    def layers(self) -> int:
        """Layers that a call runs through; times are per layer."""
        return DECODE_LAYERS if self.kind == "decode" else 1

    @property
    def name(self) -> str:
        """For progress and errors."""
        return f"{self.kind} {self.tokens} {self.dtype} D={self.head_dim} {self.kv_heads * self.group}:{self.kv_heads}"

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random q [HQ, T, D], k and v [HKV, N, D], each head's tokens side by side."""
        generator = torch.Generator().manual_seed(0)
        asked = self.tokens if self.kind == "prefill" else 1
        shapes = ((self.kv_heads * self.group, asked), (self.kv_heads, self.tokens), (self.kv_heads, self.tokens))
        q, k, v = (torch.randn(*shape, self.head_dim, generator=generator) for shape in shapes)
        dtype = getattr(torch, self.dtype)
        return q.to(dtype), k.to(dtype), v.to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A call to time. `path` says afterwards which way it took, `pairs_ratio` what part of causal pairs it computes."""

    name: str
    plan: str
    pairs_ratio: float
    call: Callable[[], object]
    path: Callable[[], str] = lambda: ""


def cases(tokens: int) -> Iterator[Case]:
    """The grid at one length; decodes at an eighth and a quarter of it as well, where dense may win."""
    for dtype in ("float32", "bfloat16"):
        for head_dim in (64, 128):
            for kv_heads, group in ((2, 1), (2, 4)):
                yield Case("prefill", tokens, dtype, head_dim, kv_heads, group)
            for group in (1, 4):
                for cached in (tokens // 8, tokens // 4, tokens):
                    yield Case("decode", cached, dtype, head_dim, 8, group)


def span_rules(shares: tuple[float, float], kv_heads: int, layers: int = 1) -> SpanRules:
    """Half of the heads of each layer keep the first share, half the second."""
    betas = [round(share * BETA_ONE) for share in shares for _ in range(kv_heads // 2)]
    beta = np.array([betas] * layers, dtype=np.int64)  # [L, HKV]
    return SpanRules(np.zeros_like(beta), beta, SINK_TOKENS, LEAST_SPAN)


def subjects(case: Case) -> Iterator[Subject]:
    """Dense attention first, then ours under every plan, then flex_attention where it has a kernel."""
    q, k, v = case.tensors()
    yield Subject(DENSE, "", 1.0, _dense(case, q, k, v))
    for plan, shares in PLANS.items():
        rules = span_rules(shares, case.kv_heads, case.layers)
        make = _prefill if case.kind == "prefill" else _decode
        yield make(plan, rules, q, k, v)
    if case.kind == "prefill" and case.group == 1:
        rules = span_rules(PLANS[FLEX_PLAN], case.kv_heads)
        yield Subject(FLEX, FLEX_PLAN, pairs_ratio(rules, case.tokens), compiled_flex(q, k, v, rules))


def pairs_ratio(rules: SpanRules, tokens: int) -> float:
    """Part of the causal query-key pairs that the spans keep, mean over heads."""
    return float(rules.span(np.arange(1, tokens + 1)).mean(axis=(0, 1)).sum() / (tokens * (tokens + 1) / 2))


def _dense(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    if case.kind == "prefill":
        return lambda: F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=case.group > 1
        )
    packed = q.view(1, case.kv_heads, case.group, case.head_dim)  # a KV head's query heads as rows: the fastest form
    token = k[:, -1].clone(), v[:, -1].clone()  # [HKV, D]
    layers = [(k.clone(), v.clone()) for _ in range(case.layers)]

    def call() -> None:
        for keys, values in layers:
            keys[:, -1], values[:, -1] = token
            F.scaled_dot_product_attention(packed, keys[None], values[None])

    return call


def _prefill(plan: str, rules: SpanRules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Subject:
    taken = [""]
    packed = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # [T, H, D]

    def call() -> None:
        with TorchMemory(rules) as kv:
            kv.add(0)
            attend(*packed, kv, 0, Batch.pack([(0, q.shape[1], 0)]))
            taken[0] = kv.path

    return Subject(OURS, plan, pairs_ratio(rules, q.shape[1]), call, lambda: taken[0])


def _decode(plan: str, rules: SpanRules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Subject:
    kv, tokens, layers = filled(rules, k, v), k.shape[1], len(rules.alpha)
    one = q.transpose(0, 1), k[None, :, -1], v[None, :, -1]  # [1, H, D]

    def call() -> None:
        batch = Batch.pack([(0, 1, kv.length(0))])
        for layer in range(layers):
            attend(*one, kv, layer, batch)

    ratio = float(rules.span(tokens).mean() / tokens)
    return Subject(OURS, plan, ratio, call, lambda: kv.path)


def filled(rules: SpanRules, k: torch.Tensor, v: torch.Tensor) -> TorchMemory:
    """Memory that holds, in every layer, what spans keep of keys and values [HKV, N, D], as after a prefill."""
    kv = TorchMemory(rules)
    kv.add(0)
    state, starts = kv.state(0), kv.table.starts_at(k.shape[1] - 1)
    for held in state.layers:
        if any(starts[group.rule] > rules.sink_tokens for group in held.groups):
            held.split()
        for group, store in held.parts():
            heads = slice(group.first, group.stop)
            store.fill(k[heads], v[heads], starts[group.rule])
    state.lengths = [k.shape[1]] * len(state.layers)
    return kv
