"""The policies by name, and what all of them are."""

from __future__ import annotations

from typing import Protocol

from moa.errors import UsageError, closest
from moa.runner.policies.orca import Orca
from moa.runner.policies.prefill_first import PrefillFirst
from moa.runner.policies.request_level import RequestLevel
from moa.runner.policies.sarathi import Sarathi
from moa.runner.policies.turn import Turn


class Policy(Protocol):
    """Which requests run in the next step.

    `cuts` says that it keeps the token budget by cutting prompts, `reserves` that memory for a request's whole life is
    taken when it is admitted, so that nothing is ever preempted.
    """

    @property
    def name(self) -> str: ...
    @property
    def cuts(self) -> bool: ...
    @property
    def reserves(self) -> bool: ...

    def schedule(self, turn: Turn) -> None:
        """Fill a turn."""


POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Sarathi(), PrefillFirst(), Orca(), RequestLevel())}


def get_policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        UsageError: there is none; names the known ones.
    """
    if name not in POLICIES:
        raise UsageError(f"there is no policy {name!r}, known are {', '.join(POLICIES)}{closest(name, POLICIES)}")
    return POLICIES[name]
