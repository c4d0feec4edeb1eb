"""Keys and values of prompts seen before, so that a prompt that begins alike begins there.

Under spans a prefix is no set of blocks that others could share: at its end, each KV head holds its sinks and the live
tail of its own window, and dropped all between. So what is kept is whole states of sequences, each at one length: that of
every finished request (the next turn of a chat begins with it), and that at the last block boundary that a prompt shares
with an earlier one (the second request with a system prompt leaves it for the third). A state is found by the chained
hash of its blocks, seeded with the plan's digest, and by the few tokens behind its last block.

In length mode "running" a token's keys depend on the tokens before it alone, so reuse is exact; in "pinned" mode they
depend on the pinned length, too, which is part of the seed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Hashes of blocks that were seen; one of 32 bytes each, so some 10 MB at most.
SEEN_BLOCKS = 1 << 16


@dataclass(frozen=True, slots=True)
class Kept:
    """A state in memory: its id there, its length, the hash of its whole blocks, the tokens behind them."""

    holder: int
    length: int
    key: bytes
    tail: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What the cache knows about a prompt: the longest state that it begins with, and where to leave one for others."""

    kept: Kept | None
    leave_at: int | None


class PrefixCache:
    """States of sequences by the tokens that made them; least recently used ones go first.

    Args:
        digest: of the plan, "" without one.
        block_tokens: hashes are taken of so many tokens at a time.
        drop: called with a state's id when it is dropped.
    """

    def __init__(self, digest: str, block_tokens: int, drop: Callable[[int], None]) -> None:
        self.block_tokens = block_tokens
        self.asked_tokens = self.found_tokens = 0
        self._digest, self._drop = digest, drop
        self._kept: OrderedDict[tuple[bytes, tuple[int, ...]], Kept] = OrderedDict()
        self._by_key: dict[bytes, list[Kept]] = {}
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def hit_ratio(self) -> float:
        """Share of the tokens asked for that were found."""
        return self.found_tokens / self.asked_tokens if self.asked_tokens else 0.0

    def find(self, tokens: Sequence[int], pinned_tokens: int | None) -> Found:
        """The longest state that a text begins with and that leaves it a token to compute; counts as use."""
        hashes = self._hashes(tokens, pinned_tokens)
        most = len(tokens) - 1
        kept = self._longest(hashes, tokens, most)
        self.asked_tokens += len(tokens)
        if kept is not None:
            self.found_tokens += kept.length
            self._kept.move_to_end((kept.key, kept.tail))
        shared = max((i for i, key in enumerate(hashes) if i and key in self._seen), default=0)
        leave_at = min(shared, most // self.block_tokens) * self.block_tokens
        self._remember(hashes)
        return Found(kept, leave_at if leave_at > (kept.length if kept else 0) else None)

    def keep(self, holder: int, tokens: Sequence[int], pinned_tokens: int | None) -> bool:
        """Keep the state `holder` of a text; False if there is one of the same text, or the text is no block long."""
        if len(tokens) < self.block_tokens:
            return False
        hashes = self._hashes(tokens, pinned_tokens)
        tail = tuple(tokens[(len(hashes) - 1) * self.block_tokens :])
        if (hashes[-1], tail) in self._kept:
            return False
        kept = Kept(holder, len(tokens), hashes[-1], tail)
        self._kept[kept.key, tail] = kept
        self._by_key.setdefault(kept.key, []).append(kept)
        return True

    def drop_oldest(self) -> bool:
        """Drop the state that was not used for longest; False if there is none."""
        if not self._kept:
            return False
        _, kept = self._kept.popitem(last=False)
        others = self._by_key[kept.key]
        others.remove(kept)
        if not others:
            del self._by_key[kept.key]
        self._drop(kept.holder)
        return True

    def _longest(self, hashes: Sequence[bytes], tokens: Sequence[int], most: int) -> Kept | None:
        for blocks in range(len(hashes) - 1, 0, -1):
            start = blocks * self.block_tokens
            fits = [
                kept
                for kept in self._by_key.get(hashes[blocks], ())
                if kept.length <= most and tuple(tokens[start : kept.length]) == kept.tail
            ]
            if fits:
                return max(fits, key=lambda kept: kept.length)
        return None

    def _hashes(self, tokens: Sequence[int], pinned_tokens: int | None) -> list[bytes]:
        """The seed, then the hash of every whole block chained to the one before."""
        chain = [hashlib.sha256(f"{self._digest}/{pinned_tokens}".encode()).digest()]
        numbers, size = np.asarray(tokens, dtype=np.int64), self.block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            chain.append(hashlib.sha256(chain[-1] + numbers[start : start + size].tobytes()).digest())
        return chain

    def _remember(self, hashes: Sequence[bytes]) -> None:
        for key in hashes[1:]:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > SEEN_BLOCKS:
            self._seen.popitem(last=False)
