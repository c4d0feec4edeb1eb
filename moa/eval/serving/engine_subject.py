"""Our engine as a subject: one thread that steps it, so that what is measured is the engine and nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from moa.eval.serving.clock import Clock, LeapingClock
from moa.eval.serving.drive import Event
from moa.eval.serving.workload import Load
from moa.runner.engine import Engine
from moa.runner.request import FinishReason, SamplingParams
from moa.runner.stats import StepRecord


class EngineSubject:
    """An engine that takes new requests between its steps, as behind a server.

    Args:
        name: it goes by in tables.
        engine: with nothing to do; it is not closed here.
        clock: seconds for waiting; those of an idle engine are leapt over.
        on_step: told of every step.
    """

    def __init__(
        self, name: str, engine: Engine, clock: Clock | None = None, on_step: Callable[[StepRecord], None] | None = None
    ) -> None:
        self.name, self.engine, self.clock = name, engine, clock or LeapingClock()
        settings = engine.settings
        self.about: Mapping[str, object] = {
            "plan": "dense" if engine.plan is None else engine.plan.sha256,
            "policy": settings.policy,
            "backend": settings.backend,
            "token_budget": settings.token_budget if engine.scheduler.policy.cuts else None,
            "max_running": settings.max_running,
            "kv_bytes": settings.kv_bytes,
        }
        self._on_step = on_step

    def submit(self, request: int, load: Load) -> None:
        """Queue a request."""
        sampling = SamplingParams(max_tokens=load.output_tokens, ignore_eos=True)
        self.engine.add(load.prompt, sampling, name=str(request))

    def events(self, until_s: float) -> list[Event]:
        """One step; its tokens all come at its end."""
        if self.engine.is_idle:
            if math.isinf(until_s):
                raise RuntimeError("the engine is idle, yet some of its requests have not ended")
            self.clock.wait_until(until_s)
            return []
        updates, now = self.engine.step(), self.clock()
        if self._on_step is not None and self.engine.stats.last is not None:
            self._on_step(self.engine.stats.last)
        return [
            Event(
                int(update.name),
                now,
                len(update.tokens),
                is_last=update.finish is not None,
                error=update.error or (update.finish or "") * (update.finish is FinishReason.CANCELLED),
            )
            for update in updates
        ]

    def cancel_all(self) -> None:
        """End all requests."""
        self.engine.abandon()
