"""Subjects by name: our engine under a policy, dense or with a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from moa.eval.serving.drive import Subject
from moa.eval.serving.engine_subject import EngineSubject
from moa.hf.shape import text_config
from moa.plan import Plan
from moa.runner.engine import Engine
from moa.runner.settings import EngineSettings

SARATHI, PREFILL_FIRST, ORCA, REQUEST_LEVEL = "sarathi", "prefill-first", "orca", "request-level"
KV_BYTES = 1 << 30
MAX_RUNNING = 48
# Policies that do not cut prompts put several into a step up to so many tokens, a usual context.
WHOLE_BUDGET = 4096


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy, and whether it runs under the plan that is measured."""

    policy: str
    has_plan: bool = False

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.policy}, plan" if self.has_plan else self.policy


def contestants(policies: Sequence[str], *, has_plan: bool) -> list[Contestant]:
    """All policies dense, and the first of them with the plan if there is one."""
    return [*map(Contestant, policies), *([Contestant(policies[0], has_plan=True)] if has_plan else [])]


# A subject for a contestant under a token budget, until the block ends.
Opened = AbstractContextManager[Subject]
Open = Callable[[Contestant, int], Opened]


def opener(model: PreTrainedModel, plan: Plan | None, kv_bytes: int = KV_BYTES) -> Open:
    """Engines over one model, one after the other."""

    @contextmanager
    def open_one(who: Contestant, token_budget: int) -> Iterator[Subject]:
        settings = EngineSettings(
            policy=who.policy,
            token_budget=token_budget if who.policy == SARATHI else WHOLE_BUDGET,
            max_running=MAX_RUNNING,
            kv_bytes=kv_bytes,
            prefix_cache_ratio=0.0,  # prompts have nothing in common
        )
        with Engine(model, plan if who.has_plan else None, settings) as engine:
            yield EngineSubject(who.name, engine)

    return open_one


def sizes(model: PreTrainedModel) -> tuple[int, int | None]:
    """Vocabulary, and prompt and output together at most."""
    config = text_config(model)
    return config.vocab_size, getattr(config, "max_position_embeddings", None)
