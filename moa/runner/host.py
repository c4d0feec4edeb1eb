"""The real memory behind the scheduler's account: sequences that run, and states that the prefix cache keeps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from moa.errors import ResourceError, shortage
from moa.kernels.memory import KVMemory
from moa.runner.account import KVAccount
from moa.runner.policies import Job
from moa.runner.prefix_cache import PrefixCache
from moa.runner.sequence import Sequence


class MemoryHost:
    """Moves requests in and out of KV memory.

    Args:
        memory: where keys and values lie.
        account: of it.
        digest: of the plan, for the prefix cache.
        block_tokens: of the prefix cache.
        cache_slots: that the prefix cache may hold; 0 for none.
    """

    def __init__(self, memory: KVMemory, account: KVAccount, digest: str, block_tokens: int, cache_slots: int) -> None:
        self.memory, self.account = memory, account
        self.cache = PrefixCache(digest, block_tokens, self._drop) if cache_slots else None
        self.cached_slots, self._cache_slots = 0, cache_slots
        self.ids: Iterator[int] = count()

    def admit(self, job: Job) -> None:
        """Make memory for a request, from a kept prefix where there is one."""
        sequence = _known(job)
        wants_all = sequence.request.sampling.prompt_logprobs is not None
        if self.cache is None or wants_all:
            self.memory.add(job.order, job.pinned_tokens)
            return
        found = self.cache.find(sequence.tokens, job.pinned_tokens)
        job.stop_at = found.leave_at
        if found.kept is None or not self._copy(found.kept.holder, job.order):
            self.memory.add(job.order, job.pinned_tokens)
            return
        job.computed_tokens = found.kept.length
        if not job.preemptions:
            sequence.cached_tokens = found.kept.length

    def release(self, job: Job) -> None:
        """Free a request's memory; that of one that has ended well is kept for others, while nobody needs it."""
        sequence = _known(job)
        keeps = sequence.has_ended_well and self._reserve(job.order, sequence) and self._enter(job.order, sequence)
        if not keeps:
            self.memory.remove(job.order)

    def reclaim(self) -> bool:
        """Drop the kept state that was not used for longest."""
        return self.cache is not None and self.cache.drop_oldest()

    def leave(self, sequence: Sequence) -> None:
        """Keep a copy of a request's state, if it has come to where others share its prompt."""
        if sequence.stop_at is None or sequence.computed_tokens != sequence.stop_at:
            return
        sequence.stop_at = None
        holder = next(self.ids)
        if not self._reserve(holder, sequence):
            return
        if not self._copy(sequence.order, holder):
            self.account.release(holder)
        elif not self._enter(holder, sequence):
            self.memory.remove(holder)

    def clear(self) -> None:
        """Drop all kept states."""
        while self.reclaim():
            pass

    def _reserve(self, holder: int, sequence: Sequence) -> bool:
        """Take the slots of a state to be kept; False if it is too large, or requests need them."""
        if self.cache is None:
            return False
        lengths = np.array([sequence.computed_tokens])
        slots = int(self.account.footprint.held(lengths, [sequence.pinned_tokens])[0])
        if slots > self._cache_slots:
            return False
        while self.cached_slots + slots > self._cache_slots:
            self.cache.drop_oldest()
        return self.account.set(holder, slots)

    def _enter(self, holder: int, sequence: Sequence) -> bool:
        """Enter a state that has its slots into the cache; False, and without slots, if the cache has it already."""
        tokens = sequence.tokens[: sequence.computed_tokens]
        if self.cache is None or not self.cache.keep(holder, tokens, sequence.pinned_tokens):
            self.account.release(holder)
            return False
        self.cached_slots += self.account.held(holder)
        return True

    def _copy(self, source: int, target: int) -> bool:
        try:
            self.memory.copy(source, target)
        except Exception as error:
            if not isinstance(error, ResourceError) and shortage(error) is None:
                raise
            return False
        return True

    def _drop(self, holder: int) -> None:
        self.cached_slots -= self.account.held(holder)
        self.account.release(holder)
        self.memory.remove(holder)


def _known(job: Job) -> Sequence:
    if not isinstance(job, Sequence):
        raise TypeError(f"wanted a request of the engine, got {type(job).__name__}")
    return job
