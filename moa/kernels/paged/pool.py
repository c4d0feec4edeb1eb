"""Pages of keys and values in one format, taken and given back one by one."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moa.errors import ResourceError
from moa.kernels.storage import ByteCount

PAGE_TOKENS = 64
# A pool that may grow does so by this share of what is needed: each growth copies all pages once, which is little beside
# the decode steps in between, every one of which reads them all.
GROWTH_SHARE = 8

Int32Array = npt.NDArray[np.int32]
KVDtype = Literal["int8", "fp8"]
CODES: dict[KVDtype, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class PageFormat(NamedTuple):
    """What a page holds: 64 keys and values of `size` numbers in `dtype`; `scaled` ones have a scale per token."""

    size: int
    dtype: torch.dtype
    device: torch.device
    scaled: bool = False

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values and their scales."""
        return 2 * PAGE_TOKENS * (self.size * self.dtype.itemsize + 4 * self.scaled)


class PagePool:
    """Storage of pages, and which of them are free.

    Args:
        form: what a page holds.
        limit: pages there can be; None for any number.
        count: where bytes of pages in use are counted.
        at_once: storage for all `limit` pages is taken with the first one; else the pool grows when it is full.
    """

    def __init__(self, form: PageFormat, limit: int | None, count: ByteCount, at_once: bool = True) -> None:
        self.form, self.limit, self._count = form, limit, count
        self._at_once = at_once and limit is not None
        self.keys, self.values = _pages(form, 0), _pages(form, 0)  # [pages, 64, D]
        self.scales = (_scales(form, 0), _scales(form, 0)) if form.scaled else None  # of keys and values, [pages, 64]
        self._free: Int32Array = np.empty(0, dtype=np.int32)

    @property
    def pages(self) -> int:
        """Pages there are, in use or free."""
        return self.keys.shape[0]

    @property
    def used(self) -> int:
        """Pages in use."""
        return self.pages - len(self._free)

    def require(self, count: int) -> None:
        """Make sure that `count` pages can be taken, growing where that is allowed.

        Raises:
            ResourceError: a pool of fixed size has too few free pages; nothing has changed.
        """
        needed = self.used + count
        if self.limit is not None and needed > self.limit:
            raise ResourceError(
                f"the KV pool is full: {count} more pages of {PAGE_TOKENS} tokens are needed, {self.limit - self.used} of "
                f"{self.limit} are free; remove a sequence first, or make the memory with more pages"
            )
        if needed > self.pages:
            grown = needed + needed // GROWTH_SHARE
            limit = grown if self.limit is None else self.limit
            self._grow(limit if self._at_once else min(limit, grown))

    def take(self, count: int) -> Int32Array:
        """`count` free pages, int32 [count]; `require` them first."""
        taken, self._free = self._free[len(self._free) - count :], self._free[: len(self._free) - count]
        self._count.allocated += count * self.form.page_bytes
        return taken

    def give(self, pages: Int32Array) -> None:
        """Give pages back; a pool that can grow drops its storage when the last one comes back."""
        self._free = np.concatenate((self._free, pages))
        self._count.allocated -= len(pages) * self.form.page_bytes
        if self.limit is None and self.used == 0 and self.pages:
            self._resize(0)
            self._free = np.empty(0, dtype=np.int32)

    def copy(self, sources: Int32Array, targets: Int32Array) -> None:
        """Copy whole pages."""
        if len(sources):
            a, b = (torch.from_numpy(x.astype(np.int64)).to(self.form.device) for x in (sources, targets))
            for x in (self.keys, self.values, *(self.scales or ())):
                x[b] = x[a]

    def _grow(self, pages: int) -> None:
        added = np.arange(pages - 1, self.pages - 1, -1, dtype=np.int32)  # low ones are taken first
        self._resize(pages)
        self._free = np.concatenate((added, self._free))

    def _resize(self, pages: int) -> None:
        """One tensor after the other, so that only one is held twice meanwhile."""
        self.keys = _resized(self.keys, _pages(self.form, pages))
        self.values = _resized(self.values, _pages(self.form, pages))
        if self.scales is not None:
            keys, values = self.scales
            self.scales = _resized(keys, _scales(self.form, pages)), _resized(values, _scales(self.form, pages))


def _pages(form: PageFormat, count: int) -> torch.Tensor:
    return _empty((count, PAGE_TOKENS, form.size), form.dtype, form.device)


def _scales(form: PageFormat, count: int) -> torch.Tensor:
    return _empty((count, PAGE_TOKENS), torch.float32, form.device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Storage that may be written in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def _resized(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    kept = min(len(old), len(new))
    new[:kept] = old[:kept]
    return new
