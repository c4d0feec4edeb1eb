"""The scheduler: queues, account and policy together. No tensor is seen here, so that the simulator runs the same one."""

from __future__ import annotations

import numpy as np

from moa.errors import UsageError
from moa.runner.account import KVAccount
from moa.runner.policies import Host, Job, Limits, Policy, QueueOrder, Turn


class Scheduler:
    """Requests that wait and that run, and who is next.

    Args:
        policy: which requests run in a step.
        order: in which order they wait.
        account: of KV memory.
        limits: of a step; may be replaced between steps.
        host: who holds the memory.
    """

    def __init__(self, policy: Policy, order: QueueOrder, account: KVAccount, limits: Limits, host: Host) -> None:
        self.policy, self.order, self.account, self.limits = policy, order, account, limits
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.steps = 0
        self._host = host

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, job: Job) -> None:
        """Queue a job; raises ResourceError, with the numbers, if it could never be finished."""
        self.account.require_possible(job.known_tokens, job.most_cached_tokens, job.pinned_tokens)
        self.waiting.append(job)

    def next_turn(self, now_s: float) -> Turn:
        """What runs in the next step; whoever had to go for it waits again."""
        self.steps += 1
        self.waiting = self.order.sorted(self.waiting, now_s)
        turn = Turn(
            self.running,
            self.waiting,
            self.account,
            self.limits,
            self._host,
            self.order,
            self.steps,
            now_s,
            cuts=self.policy.cuts,
            reserves=self.policy.reserves,
        )
        self.policy.schedule(turn)
        return turn

    def settle(self, turn: Turn) -> None:
        """Account for a step that ran: its tokens are in memory, those that spans dropped are not any more."""
        for job, tokens in turn.parts:
            job.computed_tokens += tokens
            job.served = turn.number
            if not job.remaining_tokens:
                job.is_decoding = True
                if not self.policy.reserves:
                    job.reserved_slots = 0
        jobs = list(turn.chosen)
        lengths = np.array([job.computed_tokens for job in jobs], dtype=np.int64)
        held = self.account.footprint.held(lengths, [job.pinned_tokens for job in jobs]).tolist()
        for job, slots in zip(jobs, held, strict=True):
            self.account.set(job.order, max(slots, job.reserved_slots))

    def remove(self, job: Job) -> None:
        """Forget a job that has ended; its memory is free at once.

        Raises:
            UsageError: it is not here.
        """
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.running:
            self.running.remove(job)
            self.account.release(job.order)
            self._host.release(job)
        else:
            raise UsageError(f"request {job.order} is not here; it has ended before")

    def preempt(self, job: Job) -> None:
        """Take a running job out of memory, to be computed anew."""
        self.running.remove(job)
        self.waiting.append(job)
        job.start_over()
        self.account.release(job.order)
        self._host.release(job)
