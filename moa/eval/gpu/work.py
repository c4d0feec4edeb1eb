"""What a case costs at least: operations of the query-key pairs that a plan keeps, and bytes of live keys and values."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from moa.eval.gpu.cases import Case, KVFormat, Part
from moa.eval.gpu.patterns import Pattern
from moa.spans import Int64Array

# What a subject computes: the case's plan, all causal pairs, or one window for all heads, as long as the plan's mean
# span and without sinks.
Mask = Literal["same", "dense", "equal length"]
BF16_BYTES = 2
# Beside an 8-bit token of one head lies a float32 scale for its key, and one for its value.
SCALE_BYTES = 4


def pairs(pattern: Pattern, part: Part) -> Int64Array:
    """Keys seen, summed over the new tokens of one sequence: int64 [L, HKV]."""
    rules, total = pattern.rules, np.zeros(pattern.rules.alpha.shape, dtype=np.int64)
    for start in range(part.cached, part.cached + part.new, 1 << 14):  # [L, HKV, 16384] at a time
        p = np.arange(start, min(start + (1 << 14), part.cached + part.new), dtype=np.int64)
        first = rules.window_start(p, part.cached + part.new)  # [L, HKV, tokens]
        total += (np.minimum(p + 1, rules.sink_tokens) + np.maximum(p + 1 - first, 0)).sum(-1)
    return total


def dense_pairs(part: Part) -> int:
    """Keys seen without a plan, summed over the new tokens of one sequence."""
    end = part.cached + part.new
    return (end * (end + 1) - part.cached * (part.cached + 1)) // 2


def flops(case: Case) -> Int64Array:
    """Operations of the kept pairs, 2 per multiply-add: int64 [L], one number per layer of the pattern."""
    per_pair = 4 * case.heads.head_dim * case.heads.group
    total = np.zeros(case.pattern.layers, dtype=np.int64)
    for part in case.parts:
        total += part.sequences * pairs(case.pattern, part).sum(-1) * per_pair
    return total


def dense_flops(case: Case) -> int:
    """Operations of all causal pairs."""
    return sum(part.sequences * dense_pairs(part) for part in case.parts) * 4 * case.heads.head_dim * case.heads.heads


def live_tokens(pattern: Pattern, part: Part) -> tuple[Int64Array, Int64Array]:
    """Tokens that any new token sees, per head: sinks and window, each int64 [L, HKV]."""
    end, rules = part.cached + part.new, pattern.rules
    first = rules.window_start(part.cached, end)  # [L, HKV]
    sinks = np.full(first.shape, min(end, rules.sink_tokens), dtype=np.int64)
    return sinks, np.maximum(end - first, 0)


def kv_bytes(case: Case) -> Int64Array:
    """Bytes of the keys and values that the step has to read: int64 [L]; sinks and new tokens are always bfloat16."""
    total = np.zeros(case.pattern.layers, dtype=np.int64)
    for part in case.parts:
        sinks, live = live_tokens(case.pattern, part)
        fresh = np.minimum(live, part.new)
        whole = sinks + fresh
        per_layer = whole.sum(-1) * token_bytes(case.heads.head_dim, "bf16")
        per_layer += (live - fresh).sum(-1) * token_bytes(case.heads.head_dim, case.kv)
        total += part.sequences * per_layer
    return total


def token_bytes(head_dim: int, kv: KVFormat) -> int:
    """Bytes of one token's key and value in one head."""
    return 2 * head_dim * BF16_BYTES if kv == "bf16" else 2 * (head_dim + SCALE_BYTES)


def dense_kv_bytes(case: Case) -> int:
    """Bytes of all keys and values of the step's sequences in bfloat16."""
    tokens = sum(part.sequences * (part.cached + part.new) for part in case.parts)
    return tokens * case.heads.kv_heads * token_bytes(case.heads.head_dim, "bf16")


@lru_cache(maxsize=256)  # asked several times for every row, and long prompts take a while to count
def work_under(case: Case, mask: Mask) -> tuple[float, float]:
    """Operations and bytes of keys and values under a mask, the mean over the pattern's layers."""
    if mask == "same":
        return float(flops(case).mean()), float(kv_bytes(case).mean())
    if mask == "dense":
        return float(dense_flops(case)), float(dense_kv_bytes(case))
    heads, operations, tokens = case.heads, 0, 0
    width = case.pattern.mean_span(case.tokens)
    for part in case.parts:
        p = np.arange(part.cached, part.cached + part.new, dtype=np.int64)
        operations += part.sequences * int(np.minimum(p + 1, width).sum())
        tokens += part.sequences * min(part.cached + part.new, width + part.new - 1)
    per_pair, per_token = 4 * heads.head_dim * heads.heads, heads.kv_heads * token_bytes(heads.head_dim, "bf16")
    return float(operations * per_pair), float(tokens * per_token)


def query_bytes(case: Case) -> int:
    """Bytes of the step's queries and outputs in bfloat16."""
    return 2 * case.new_tokens * case.heads.heads * case.heads.head_dim * BF16_BYTES
