"""Live keys and values of some KV heads of one sequence and layer, in a row: sinks, then the window in order of position."""

from __future__ import annotations

import torch

from moa.kernels.storage import ByteCount, Storage, reserves_pages

# Spare slots of plain tensors, which keeps measured bytes within 2 % of computed ones; moving tokens to the front of
# their room then costs as much as copying 66 tokens per step.
SLACK_PERCENT, LEAST_SLACK = 1.5, 2
# In windows up to so long a new token takes the dropped one's place: beside their attention, moving sinks is dear.
MOST_REPLACED = 512


def slack(live_tokens: int) -> int:
    """Spare slots that come with room for so many tokens."""
    return max(LEAST_SLACK, int(live_tokens * SLACK_PERCENT / 100))


class Store:
    """Slots `[first, end)` are live. Tokens come in at the end; as the window moves on, the sinks move along before it.

    So all that a query sees is one view, whatever was dropped. Where a native window can hide single sinks they keep their
    order; elsewhere the sinks before a window that moves by less than their number change places, since keys carry
    their rotary position. For the same reason single tokens of a short window that no longer grows take the place of those
    that they push out; the window is put in order again as soon as somebody asks for it.

    Args:
        count: where bytes are counted.
        sink_tokens: first tokens that stay.
        keeps_order: whether the sinks stay in order.
    """

    def __init__(self, count: ByteCount, sink_tokens: int, keeps_order: bool) -> None:
        self.first = self.end = self.sinks = 0
        self.window_from = sink_tokens  # position of the window's first token
        self._sinks_to_come = sink_tokens
        self._keeps_order = keeps_order
        self._oldest = 0  # the window's first token lies so many slots behind its beginning
        self._has_dropped = False  # the last token that came
        self._count = count
        self._storage: Storage | None = None

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def data(self) -> torch.Tensor:
        """All slots [2, H, capacity, D]; only for a store that is not empty."""
        if self._storage is None:
            raise ValueError("an empty store has no storage")
        return self._storage.data

    @property
    def is_paged(self) -> bool:
        """Whether dropped tokens' pages go back to the system one by one."""
        return self._storage is not None and self._storage.is_paged

    @property
    def has_lost_sinks(self) -> bool:
        """Whether there were sinks, which no query sees any more."""
        return not self.sinks and not self._sinks_to_come

    def live(self, hidden_sinks: int = 0) -> torch.Tensor:
        """A view of the live tokens but the first `hidden_sinks`, [2, H, n, D]."""
        self._straighten()
        return self.data[:, :, self.first + hidden_sinks : self.end]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the tokens that follow, each [H, T, D]."""
        self._straighten()
        count = keys.shape[1]
        storage = self._room_for(count, keys)
        storage.data[0, :, self.end : self.end + count] = keys
        storage.data[1, :, self.end : self.end + count] = values
        self._grow(storage, count)

    def live_pair(self, hidden_sinks: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as views of keys and of values, each [1, H, n, D], the window in any order; for decode steps."""
        if self._storage is None:
            raise ValueError("an empty store has no storage")
        return self._storage.pair(self.first + hidden_sinks, self.end)

    def append_one(self, pair: torch.Tensor) -> None:
        """Store the key and value of the token that follows, [2, H, 1, D]."""
        self._straighten()
        storage = self._storage
        if storage is None or self.end >= storage.capacity:
            storage = self._room_for(1, pair[0])
        storage.data.narrow(2, self.end, 1).copy_(pair)
        self._grow(storage, 1)

    def replace_one(self, pair: torch.Tensor, window_from: int) -> bool:
        """Store the token that follows, [2, H, 1, D], in the place of the one token that a window from there leaves out.

        False where that is not the way: nothing has changed, the caller drops and appends.
        """
        storage, dropped = self._storage, window_from - self.window_from
        may, self._has_dropped = self._has_dropped, dropped == 1
        window = self.end - self.first - self.sinks
        if storage is None or not may or dropped != 1 or not 0 < window <= MOST_REPLACED or self._keeps_order:
            return False
        slot = self.first + self.sinks + self._oldest
        storage.data.narrow(2, slot, 1).copy_(pair)
        self._oldest = (self._oldest + 1) % window
        self.window_from = window_from
        return True

    def fill(self, keys: torch.Tensor, values: torch.Tensor, window_from: int) -> None:
        """Store of a text's first tokens, each [H, T, D], the sinks and the window from `window_from` on.

        The store is empty.
        """
        sinks = self._sinks_to_come
        if window_from > sinks:
            self._room_for(sinks + keys.shape[1] - window_from, keys)
            self.append(keys[:, :sinks], values[:, :sinks])
            self.window_from = window_from
            keys, values = keys[:, window_from:], values[:, window_from:]
        self.append(keys, values)

    def drop(self, window_from: int) -> None:
        """Forget what lies before a window that begins at `window_from`, and move the sinks to it."""
        count = window_from - self.window_from
        if count == 0:
            return
        self._straighten()
        if self.sinks:
            moved = self.sinks if self._keeps_order else min(count, self.sinks)
            source = self.data.narrow(2, self.first, moved)
            room = self.data.narrow(2, self.first + self.sinks + count - moved, moved)
            room.copy_(source.clone() if count < moved else source)
        self.first += count
        self.window_from = window_from
        self._release()

    def drop_sinks(self) -> None:
        """Forget the sinks, which no query sees any more."""
        self.first, self.sinks = self.first + self.sinks, 0
        self._release()

    def trim(self) -> None:
        """Give room back that a long chunk has left empty."""
        storage, live = self._storage, len(self)
        if storage is None:
            return
        paged = reserves_pages(self.data, live)
        if storage.is_paged != paged or (not paged and storage.capacity > live + slack(live)):
            self._move(live + slack(live), self.data[0], paged)

    def heads(self, part: slice) -> Store:
        """A store of some of the heads, with storage of its own."""
        other = Store(self._count, 0, self._keeps_order)
        if len(self):
            other.append(*self.live()[:, part])
        other.sinks, other._sinks_to_come, other.window_from = self.sinks, self._sinks_to_come, self.window_from
        return other

    def clone(self) -> Store:
        """An independent copy."""
        return self.heads(slice(None))

    def release(self) -> None:
        """Give the storage back."""
        if self._storage is not None:
            self._storage.close()
        self._storage, self.first, self.end, self._oldest = None, 0, 0, 0

    def _straighten(self) -> None:
        """Put the window in order of position."""
        if self._oldest:
            window = self.data[:, :, self.first + self.sinks : self.end]
            window.copy_(window.roll(-self._oldest, 2))
            self._oldest = 0

    def _grow(self, storage: Storage, count: int) -> None:
        self.end += count
        storage.touch(self.end)
        if self._sinks_to_come:
            came = min(count, self._sinks_to_come)
            self.sinks, self._sinks_to_come = self.sinks + came, self._sinks_to_come - came

    def _release(self) -> None:
        if self._storage is not None:
            self._storage.release_below(self.first)

    def _room_for(self, count: int, like: torch.Tensor) -> Storage:
        """The storage, with `count` free slots behind the end."""
        storage = self._storage
        if storage is not None and self.end + count <= storage.capacity:
            return storage
        live = len(self)
        paged, spare = reserves_pages(like, live + count), slack(live + count)
        if storage is None or paged or storage.capacity < live + count + spare // 2:
            return self._move(live + count + spare, like, paged)
        storage.data[:, :, :live] = self.live().clone()
        self.first, self.end = 0, live
        return storage

    def _move(self, slots: int, like: torch.Tensor, paged: bool) -> Storage:
        """Move to new storage; out of pages head by head, so that they are given back as others are taken."""
        self._straighten()
        old, live = self._storage, len(self)
        new = Storage(self._count, like, slots, paged)
        if old is not None and not old.is_paged:
            new.data[:, :, :live] = self.live()
            old.close()
        elif old is not None:
            for head in range(new.data.shape[1]):
                new.data[:, head, :live] = old.data[:, head, self.first : self.end]
                old.release_head(head)
            old.close()
        self._storage, self.first, self.end = new, 0, live
        new.touch(live)
        return new
