"""What an attachment says of itself: the plan's spans, KV bytes beside dense ones, and how attention ran last."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from moa.hf.cache import Usage
from moa.hf.support import native_windows
from moa.plan import ModelShape, Plan
from moa.units import human_bytes

USUAL_LENGTHS_TOKENS = (4096, 32768)
# The two halves of a path of the torch backend, see `moa.kernels.memory.TorchMemory`.
REASONS = {
    "dense": "nothing has been dropped yet",
    "spans": "spans have dropped keys, each rule runs by itself",
    "views": "one token, which sees all that is kept",
    "tiles": "a CPU, and no gradient is asked for",
    "flash": "a CPU, and torch's kernel is the faster one here",
    "masks": "a gradient, a cap on scores, or no CPU",
}


def plan_lines(plan: Plan) -> Iterator[str]:
    """What the plan is for, and its spans at the lengths it was made for."""
    shape, rules = plan.model, plan.span_rules
    yield (
        f"plan {plan.sha256[:12]} on {shape.architecture} ({shape.layers} layers x {shape.kv_heads} KV heads, "
        f"{plan.distinct_rules} rules, {plan.length_mode} lengths)"
    )
    for tokens in [length.length_tokens for length in plan.lengths] or USUAL_LENGTHS_TOKENS:
        spans = rules.span(tokens)  # [L, HKV]
        yield (
            f"at {tokens:,} tokens: spans {spans.min():,} to {spans.max():,}, density {rules.density_ratio(tokens):.3f}"
        )


def usage_lines(usage: Usage, dense: int) -> Iterator[str]:
    """KV bytes of the latest cache beside `dense` ones, and how its last step ran."""
    if not usage.slots:
        yield "KV: no step yet"
        return
    held = usage.bytes.allocated
    yield (
        f"KV: {human_bytes(held)} for {usage.rows} x {usage.slots:,} tokens, "
        f"dense {human_bytes(dense)} ({100 * held / dense:.0f} %)"
    )
    if usage.path:
        kept, _, way = usage.path.partition(" by ")
        yield f"last step: {usage.path} ({REASONS[kept]}; {REASONS[way]})"


def dense_bytes(config: PreTrainedConfig, shape: ModelShape, dtype: torch.dtype, usage: Usage) -> int:
    """Bytes of transformers' own cache after the same steps; it keeps one token less than a native window."""
    per_token = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize
    windows = native_windows(config)
    tokens = sum(usage.slots if w is None else min(usage.slots, w - 1) for w in windows)
    return usage.rows * tokens * per_token
