"""Rows of the tables of `moa bench throughput`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OfflineRow:
    """A subject that was given all requests at once, in one turn."""

    model: str
    subject: str
    turn: int
    requests: int
    input_tokens: int
    output_tokens: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class LongRow:
    """Long texts that decode under a fixed KV budget, in one turn: how many at a time, and how fast.

    `decode_tokens_per_s` is of steps in which all that fit decode and nothing else runs, median of them.
    """

    model: str
    subject: str
    turn: int
    context_tokens: int
    kv_budget_bytes: int
    concurrent: int
    decode_step_ms: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class OverheadRow:
    """Decode steps of an engine, in one turn: all of a step, and what of it was not the model's forward pass."""

    model: str
    turn: int
    batch: int
    context_tokens: int
    steps: int
    step_ms: float
    overhead_ms: float
    overhead_ratio: float
