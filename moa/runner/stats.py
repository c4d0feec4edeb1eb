"""What an engine has done, for metrics: counts since it was made, and the last step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step.

    `seconds` is all of it, `forward_s` the model's part; `prompt_tokens` were computed for unfinished prompts,
    `decode_tokens` one for each running decode; `running`, `waiting` and `kv_usage_ratio` are those after it.
    """

    number: int
    started_s: float
    seconds: float
    forward_s: float
    prompt_tokens: int
    decode_tokens: int
    preempted: int
    running: int
    waiting: int
    kv_usage_ratio: float


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made.

    `steps`, `prompt_tokens` (computed, recomputation included), `output_tokens`, `preemptions`, `failed_steps`,
    `seconds` and `forward_s` of all steps, `finished` requests by reason; `last` is the last step that ran.
    """

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    seconds: float = 0.0
    forward_s: float = 0.0
    finished: Counter[str] = field(default_factory=Counter)
    last: StepRecord | None = None

    @property
    def overhead_ratio(self) -> float:
        """Share of the steps' time that was not the model's."""
        return 1 - self.forward_s / self.seconds if self.seconds else 0.0

    def add(self, record: StepRecord) -> None:
        """Count a step."""
        self.steps += 1
        self.prompt_tokens += record.prompt_tokens
        self.preemptions += record.preempted
        self.seconds += record.seconds
        self.forward_s += record.forward_s
        self.last = record
