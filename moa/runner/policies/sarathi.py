"""Stall-free batching (Sarathi-Serve, arXiv 2403.02310, algorithm 3): decodes first, and prompts in what the budget leaves."""

from __future__ import annotations

from moa.runner.policies.turn import Turn


class Sarathi:
    """No decode waits for a prompt: prompts are cut to what the token budget has left."""

    name, cuts, reserves = "sarathi", True, False

    def schedule(self, turn: Turn) -> None:
        """Running decodes, then unfinished prompts, then new requests."""
        turn.run_decodes()
        for job in turn.prefills():
            turn.run_chunk(job)
        while turn.left_for_prompts and (new := turn.admit()):
            turn.run_chunk(new)
