"""What a policy knows about a request: counts and times, no tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A request on its way.

    Args:
        order: number of its arrival; who has the highest is the youngest.
        arrived_s: when, on the scheduler's clock.
        known_tokens: of prompt and output so far.
        most_cached_tokens: whose keys are in memory at the very end.
        pinned_tokens: length that a pinned plan's spans are pinned to.
        computed_tokens: whose keys are in memory now.
        is_decoding: whether it has given a token since it was admitted: from then on it takes one token a step.
        stop_at: the next chunk must not go beyond so many tokens, where something is to be kept of them; None for no stop.
        reserved_slots: KV memory that stays its own whatever it holds: of its whole prompt, until that is computed.
        served: number of the step that it last took part in.
        preemptions: how often it was taken out.
        admitted_s: when it first came into memory.
    """

    order: int
    arrived_s: float
    known_tokens: int
    most_cached_tokens: int
    pinned_tokens: int | None = None
    computed_tokens: int = 0
    is_decoding: bool = False
    stop_at: int | None = None
    reserved_slots: int = 0
    served: int = -1
    preemptions: int = 0
    admitted_s: float | None = None

    @property
    def remaining_tokens(self) -> int:
        """Tokens to compute before it can give the next one."""
        return self.known_tokens - self.computed_tokens

    def start_over(self) -> None:
        """Its memory is gone: everything that is known is to be computed anew."""
        self.computed_tokens, self.reserved_slots, self.is_decoding, self.stop_at = 0, 0, False, None
        self.preemptions += 1
