"""The largest text that fits."""

from __future__ import annotations

from collections.abc import Callable


def most_units(size: Callable[[int], int | None], limit: int, least: int, guess: int) -> int | None:
    """The most units whose size is at most `limit`: growing steps away from a guess, then by halves.

    Where sizes do not quite grow with the units, the result still fits.

    Args:
        size: of so many units; None where there are not so many.
        limit: greatest size.
        least: fewest units.
        guess: where to begin; a good one saves calls.

    Returns:
        The number; None where not even `least` fits.
    """

    def fits(units: int) -> bool:
        found = size(units)
        return found is not None and found <= limit

    low = high = max(least, guess)
    step = 1
    if fits(low):
        while fits(high := low + step):
            low, step = high, 2 * step
    else:
        while not fits(low := max(least, high - step)):
            if low == least:
                return None
            high, step = low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
