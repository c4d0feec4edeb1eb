"""Prompts before decodes, each kind in steps of its own (vLLM's scheduler before chunked prefill)."""

from __future__ import annotations

from moa.runner.policies.turn import Turn


class PrefillFirst:
    """While a prompt can run, decodes stall. Prompts run whole, several in a step up to the token budget."""

    name, cuts, reserves = "prefill-first", False, False

    def schedule(self, turn: Turn) -> None:
        """Prompts if there are any, else decodes."""
        for job in turn.prefills():  # those that `chunk_tokens` has cut
            turn.run_chunk(job)
        while self._has_room(turn) and (new := turn.admit()):
            turn.run_chunk(new)
        if not turn.chosen:
            turn.run_decodes()

    def _has_room(self, turn: Turn) -> bool:
        """Whether the next prompt fits the budget as a whole; the first of a step may be longer."""
        budget = turn.limits.token_budget
        if not turn.waiting or not turn.chosen or budget is None:
            return True
        return turn.tokens + turn.waiting[0].remaining_tokens <= budget
