"""Room for keys and values: plain tensors, or an address range whose pages are committed by first touch and given back."""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from copy import copy, deepcopy

import torch

# Pages round up at both ends of every head's keys and values: from 128 pages on that is below 2 %.
LEAST_PAGES = 128
# Linux's value on x86 and ARM; Python knows the name from 3.13 on.
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
# The range is so many times what is needed now; address space is plenty, and moving to a new range is rare.
RESERVE_TIMES = 4
# Behind a window, pages are given back once they are this share of the live ones: a call to the system for each is slow.
RELEASE_SHARE = 200


class ByteCount:
    """Bytes allocated for keys and values; outlives the memory that it counts, so that it can be read afterwards."""

    def __init__(self) -> None:
        self.allocated = 0


def reserves_pages(like: torch.Tensor, slots: int) -> bool:
    """Whether `slots` tokens like `like` [..., D] go to pages: Linux, CPU, and enough of them."""
    if like.device.type != "cpu" or sys.platform != "linux":
        return False
    return slots * like.shape[-1] * like.element_size() >= LEAST_PAGES * mmap.PAGESIZE


class Storage:
    """A tensor `data` [2, H, capacity, D] for keys and values like `like` [H, ..., D], writable in and out of inference mode.

    Args:
        count: where its bytes are counted: all of a plain tensor's, the committed pages of a reserved range.
        like: gives heads, size, dtype and device.
        slots: tokens that must fit.
        paged: reserve a range instead; `capacity` is then larger.
    """

    def __init__(self, count: ByteCount, like: torch.Tensor, slots: int, paged: bool) -> None:
        self.is_paged, self.nbytes, self._count = paged, 0, count
        self._map: mmap.mmap | None = None
        self._row_bytes = like.shape[-1] * like.element_size()  # of one head's keys of a token
        self._regions = 2 * like.shape[0]
        self._pair_bounds = (0, 0)
        self._low = self._high = 0  # pages [low, high) of every region are committed
        with torch.inference_mode(False):
            self._hold(self._reserve(like, slots) if paged else like.new_empty(2, like.shape[0], slots, like.shape[-1]))
        if not paged:
            self._resize(self.data.nbytes)

    def __deepcopy__(self, memo: dict[int, object]) -> Storage:
        """A copy of what is committed; its bytes are in the copied count already."""
        other = copy(self)
        other._count = deepcopy(self._count, memo)
        with torch.inference_mode(False):
            if self._map is None:
                other._hold(self.data.clone())
            else:
                other._hold(other._map_range(self.data.shape, self.data.dtype))
                first, end = (
                    -(-self._low * mmap.PAGESIZE // self._row_bytes),
                    self._high * mmap.PAGESIZE // self._row_bytes,
                )
                other.data[:, :, first:end] = self.data[:, :, first:end]
        return other

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.data.shape[2]

    def touch(self, end: int) -> None:
        """Count the pages that writing slots below `end` commits."""
        if self.is_paged and (high := -(-end * self._row_bytes // mmap.PAGESIZE)) > self._high:
            self._high = high
            self._recount()

    def release_below(self, first: int) -> None:
        """Give the pages before slot `first` back, if they are many beside those that stay."""
        if not self.is_paged:
            return
        low = first * self._row_bytes // mmap.PAGESIZE
        if (low - self._low) * RELEASE_SHARE >= max(RELEASE_SHARE, self._high - low):
            for region in range(self._regions):
                self._discard(region, self._low, low)
            self._low = low
            self._recount()

    def release_head(self, head: int) -> None:
        """Give one head's pages back, whose tokens have moved; the count follows with `close`."""
        for region in (head, head + self._regions // 2) if self.is_paged else ():
            self._discard(region, self._low, self._high)

    def close(self) -> None:
        """Give all back."""
        self._hold(self.data.new_empty(*self.data.shape[:2], 0, self.data.shape[3]))
        self._map = None
        self._resize(0)

    def pair(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and of values [1, H, end - first, D]; the last ones asked for are kept."""
        if self._pair_bounds != (first, end):
            count = end - first
            self._pair = self.keys.narrow(2, first, count), self.values.narrow(2, first, count)
            self._pair_bounds = first, end
        return self._pair

    def _hold(self, data: torch.Tensor) -> None:
        """Keep the tensor, and its two halves [1, H, capacity, D], which a decode step would take anew for every layer."""
        self.data, (self.keys, self.values) = data, data.unsqueeze(1).unbind(0)
        self._pair = self.keys, self.values
        self._pair_bounds = 0, data.shape[2]

    def _reserve(self, like: torch.Tensor, slots: int) -> torch.Tensor:
        """A private range [2, H, capacity, D] in which every head's keys and values begin a page."""
        per_page = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._row_bytes)  # fewest rows that fill whole pages
        capacity = -(-RESERVE_TIMES * slots // per_page) * per_page
        return self._map_range((2, like.shape[0], capacity, like.shape[-1]), like.dtype)

    def _map_range(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
        with suppress(OSError):  # of kernels without huge pages
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # they would commit, and hold back, 2 MiB at a time
        return torch.frombuffer(self._map, dtype=dtype).view(shape)

    def _discard(self, region: int, low: int, high: int) -> None:
        if self._map is not None and high > low:
            start = region * self.capacity * self._row_bytes + low * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, (high - low) * mmap.PAGESIZE)

    def _recount(self) -> None:
        self._resize(self._regions * (self._high - self._low) * mmap.PAGESIZE)

    def _resize(self, nbytes: int) -> None:
        self._count.allocated += nbytes - self.nbytes
        self.nbytes = nbytes
