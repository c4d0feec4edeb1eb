"""One turn of the scheduler: what may still run in the next step, and who gets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moa.errors import UsageError
from moa.runner.account import KVAccount
from moa.runner.policies.job import Job
from moa.runner.policies.order import QueueOrder

NO_LIMIT = 1 << 40
# Of all slots, left free when a request is admitted beside others, so that those can grow before one must go again.
WATERMARK_SHARE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step may hold.

    Args:
        token_budget: tokens of a step, decodes included; None for no limit. Only policies that cut prompts keep it.
        chunk_tokens: tokens of one request's prompt in a step; None for no limit.
        max_running: requests that are in memory.
        tile_tokens: a matrix product is rounded up to so many tokens, so a step that cuts a prompt has a multiple of it.

    Raises:
        UsageError: one of them is below 1.
    """

    token_budget: int | None = 512
    chunk_tokens: int | None = None
    max_running: int = 64
    tile_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("token_budget", "chunk_tokens", "max_running", "tile_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")


class Host(Protocol):
    """Who holds the real memory: called at once when the scheduler moves a request in or out."""

    def admit(self, job: Job) -> None:
        """Make memory for a job; `computed_tokens` and `stop_at` may be set from what is kept of other requests."""

    def release(self, job: Job) -> None:
        """Free its memory."""

    def reclaim(self) -> bool:
        """Free something that is kept for requests to come; False if there is nothing."""


class Turn:
    """What a policy is given to fill: it asks for jobs, and has them run.

    Args:
        running: jobs in memory, in order of arrival; changed here.
        waiting: jobs that are not, in the order they are to be served; changed here.
        account: of KV memory.
        limits: of the step.
        host: who holds the memory.
        order: of unfinished prompts.
        number: of the step.
        now_s: time on the scheduler's clock.
        cuts: whether the policy keeps the token budget by cutting prompts.
        reserves: whether memory for a request's whole life is taken when it is admitted.
    """

    def __init__(
        self,
        running: list[Job],
        waiting: list[Job],
        account: KVAccount,
        limits: Limits,
        host: Host,
        order: QueueOrder,
        number: int,
        now_s: float,
        *,
        cuts: bool,
        reserves: bool,
    ) -> None:
        self.running, self.waiting, self.limits = running, waiting, limits
        self.number, self.now_s = number, now_s
        self.chosen: dict[Job, int] = {}
        self.preempted: list[Job] = []
        self._account, self._host, self._order, self._reserves = account, host, order, reserves
        self._budget = limits.token_budget if cuts and limits.token_budget is not None else NO_LIMIT
        self._taken = self.decode_tokens = 0

    @property
    def parts(self) -> list[tuple[Job, int]]:
        """Jobs of the step and how many tokens each, decodes behind prompts or before, as they were run."""
        return list(self.chosen.items())

    @property
    def tokens(self) -> int:
        """Tokens of the step so far."""
        return self._taken

    @property
    def left(self) -> int:
        """Tokens that may be added."""
        return max(0, self._budget - self._taken)

    def decodes(self) -> list[Job]:
        """Jobs that take one token each, those first that were not served for longest."""
        return sorted((job for job in self.running if job.is_decoding), key=lambda job: (job.served, job.order))

    def prefills(self) -> list[Job]:
        """Jobs in memory whose prompt is not finished, in queue order."""
        return self._order.sorted((job for job in self.running if not job.is_decoding), self.now_s)

    def run_decodes(self) -> None:
        """Run every decode that the budget has room for; who finds no memory makes the youngest go, be it itself."""
        jobs = self.decodes()[: self.left]
        if not jobs:
            return
        lengths = np.array([job.computed_tokens for job in jobs], dtype=np.int64)
        wanted = self._account.footprint.during(lengths, lengths + 1, [job.pinned_tokens for job in jobs]).tolist()
        for job, slots in zip(jobs, wanted, strict=True):
            if job.is_decoding and self._hold(job, max(slots, job.reserved_slots)):
                self._choose(job, 1)
                self.decode_tokens += 1

    def run_chunk(self, job: Job) -> int:
        """Run as many tokens of a job's prompt as limits and memory allow; gives how many."""
        wanted = min(job.remaining_tokens, self.left_for_prompts, self.limits.chunk_tokens or NO_LIMIT)
        if job.stop_at is not None and job.stop_at > job.computed_tokens:
            wanted = min(wanted, job.stop_at - job.computed_tokens)
        tokens = self._fitting(job, wanted)
        if tokens:
            self._choose(job, tokens)
        return tokens

    def admit(self) -> Job | None:
        """Take the first waiting job into memory, if there is room; who waits first is never passed by another."""
        if not self.waiting or len(self.running) >= self.limits.max_running or self.preempted:
            return None
        job = self.waiting[0]
        length = job.most_cached_tokens if self._reserves else job.known_tokens
        slots = self._account.footprint.most(length, job.pinned_tokens)
        spare = (self._account.total_slots or 0) // WATERMARK_SHARE if self.running else 0
        while slots + spare > self._account.free_slots:
            if not self._host.reclaim():
                return None
        self._account.set(job.order, slots)
        job.reserved_slots = slots
        self.waiting.remove(job)
        self.running.append(job)
        self.running.sort(key=lambda job: job.order)
        if job.admitted_s is None:
            job.admitted_s = self.now_s
        self._host.admit(job)
        return job

    @property
    def left_for_prompts(self) -> int:
        """Tokens that prompts may add: up to the last whole tile, if decodes have not passed it."""
        whole = self._budget - self._budget % self.limits.tile_tokens
        return max(0, (whole if whole > self.decode_tokens else self._budget) - self._taken)

    def _choose(self, job: Job, tokens: int) -> None:
        self.chosen[job] = tokens
        self._taken += tokens

    def _hold(self, job: Job, slots: int) -> bool:
        """Let a job have so many slots; False if it was itself the youngest, and had to go."""
        while not self._account.set(job.order, slots):
            if self._host.reclaim():
                continue
            victim = max(self.running, key=lambda other: other.order)
            self._preempt(victim)
            if victim is job:
                return False
        return True

    def _fitting(self, job: Job, wanted: int) -> int:
        """The most tokens up to `wanted`, by halves, whose step fits in memory; these are held then."""
        while wanted > 0:
            start, end = (np.array([n], dtype=np.int64) for n in (job.computed_tokens, job.computed_tokens + wanted))
            slots = int(self._account.footprint.during(start, end, [job.pinned_tokens])[0])
            if self._account.set(job.order, max(slots, job.reserved_slots)):
                return wanted
            if not self._host.reclaim():
                wanted //= 2
        return 0

    def _preempt(self, job: Job) -> None:
        """Take a job out of memory; it is computed anew, with what it has said as part of its prompt."""
        taken = self.chosen.pop(job, 0)
        self._taken -= taken
        self.decode_tokens -= taken if job.is_decoding else 0
        self.running.remove(job)
        self.preempted.append(job)
        self.waiting.append(job)
        job.start_over()
        self._account.release(job.order)
        self._host.release(job)
