"""Iteration-level batching (Orca, OSDI 2022): all decodes with all new prompts as a whole, memory reserved ahead."""

from __future__ import annotations

from moa.runner.policies.turn import Turn


class Orca:
    """Every step holds all running requests; a new prompt joins at once, however long it is."""

    name, cuts, reserves = "orca", False, True

    def schedule(self, turn: Turn) -> None:
        """Decodes, and all prompts that memory has room for."""
        turn.run_decodes()
        for job in turn.prefills():  # those that `chunk_tokens` has cut
            turn.run_chunk(job)
        while new := turn.admit():
            turn.run_chunk(new)
