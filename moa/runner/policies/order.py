"""In which order requests wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moa.errors import UsageError, closest
from moa.runner.policies.job import Job

# Tokens by which a prompt counts as shorter for each second that it has waited (Nexus, section 5.5).
AGEING_TOKENS_PER_S = 15.0


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """An order of waiting requests: the least key comes first, of equal ones the one that came first."""

    name: str
    key: Callable[[Job, float], float]

    def sorted(self, jobs: Iterable[Job], now_s: float) -> list[Job]:
        """Jobs as they are to be served."""
        return sorted(jobs, key=lambda job: (self.key(job, now_s), job.order))


def _came(job: Job, now_s: float) -> float:
    return 0.0


def _aged_remainder(job: Job, now_s: float) -> float:
    """Nexus: remaining prefill, less what was waited; whoever waits long enough comes first, so nobody starves."""
    return job.remaining_tokens - AGEING_TOKENS_PER_S * (now_s - job.arrived_s)


ORDERS = {
    "fcfs": QueueOrder("fcfs", _came),
    "spf": QueueOrder("spf", _aged_remainder),
}


def get_order(name: str) -> QueueOrder:
    """The order called `name`.

    Raises:
        UsageError: there is none; names the known ones.
    """
    if name not in ORDERS:
        raise UsageError(f"there is no queue order {name!r}, known are {', '.join(ORDERS)}{closest(name, ORDERS)}")
    return ORDERS[name]
