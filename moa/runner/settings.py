"""How an engine runs: one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moa.errors import UsageError

TOKEN_BUDGET = 512  # of a step, where nobody says another


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Options of an engine.

    Args:
        policy: "sarathi", "prefill-first", "orca" or "request-level".
        order: of waiting requests, "fcfs" or "spf" (shortest remaining prompt first, with ageing).
        token_budget: tokens of a step, decodes included; None for no limit; "auto" for what keeps `tbt_ms`, by a cost model
            that is measured when the engine starts and corrected by every step.
        tbt_ms: with "auto", milliseconds wanted between two tokens of a request.
        chunk_tokens: tokens of one prompt in a step; None for what the policy makes of it.
        max_running: requests in memory at a time.
        max_waiting: requests that may wait; more are refused with `QueueFullError`.
        tile_tokens: steps that cut a prompt are made a multiple of it; None for 64 on a GPU, 1 elsewhere.
        backend: of attention, as for `moa.apply`.
        kv_dtype: as for `moa.apply`.
        kv_bytes: KV memory of all requests together; None for half of what is free.
        prefix_cache_ratio: share of the KV memory that keys of finished prompts may hold while nobody needs it; 0 for no
            prefix cache.
        prefix_block_tokens: prefixes of different requests are told alike in blocks of so many tokens.
        context_tokens: prompt and output together at most; None for what the model says.
        allow_other_weights: accept a plan made for other weights of the same shape.

    Raises:
        UsageError: a number that cannot be.
    """

    policy: str = "sarathi"
    order: str = "fcfs"
    token_budget: int | Literal["auto"] | None = TOKEN_BUDGET
    tbt_ms: float | None = None
    chunk_tokens: int | None = None
    max_running: int = 64
    max_waiting: int = 4096
    tile_tokens: int | None = None
    backend: str = "torch"
    kv_dtype: str | None = None
    kv_bytes: int | None = None
    prefix_cache_ratio: float = 0.25
    prefix_block_tokens: int = 64
    context_tokens: int | None = None
    allow_other_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("max_waiting", "kv_bytes", "prefix_block_tokens", "context_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.prefix_cache_ratio <= 1:
            raise UsageError(f"prefix_cache_ratio must lie in [0, 1], got {self.prefix_cache_ratio}")
        if (self.token_budget == "auto") != (self.tbt_ms is not None):
            raise UsageError("token_budget 'auto' and tbt_ms go together: the budget is what keeps that time")
        if self.tbt_ms is not None and not 0 < self.tbt_ms < math.inf:
            raise UsageError(f"tbt_ms must be above 0, got {self.tbt_ms}")
