"""Request-level batching (FasterTransformer): a batch is filled, runs until its last request ends, then comes the next."""

from __future__ import annotations

from moa.runner.policies.turn import Turn


class RequestLevel:
    """Nobody joins a batch that runs."""

    name, cuts, reserves = "request-level", False, True

    def schedule(self, turn: Turn) -> None:
        """Fill an empty batch; else its prompts, then its decodes."""
        if not turn.running:
            while turn.admit():
                pass
        for job in turn.prefills():
            turn.run_chunk(job)
        if not turn.chosen:
            turn.run_decodes()
