"""Capacity: the highest request rate at which a subject keeps its promises, found by halving on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# A rate that holds nowhere near the first guess is given up.
MOST_TRIALS = 16
# From one rate to the next while all of them hold, or none.
STEP = 1.5


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate that held and the lowest that did not: 0 where none held, infinity where none failed."""

    holds: float
    fails: float
    trials: int


def find_capacity(holds: Callable[[float], bool], guess: float, *, most: float, within: float = 1.1) -> Capacity:
    """Go up or down until one rate holds and one fails, then go between until they are close.

    Args:
        holds: whether a rate can be kept; meant to be True below a rate and False above.
        guess: where to begin.
        most: no rate above it is tried.
        within: stop where the lowest failing rate is at most so many times the highest one that holds.

    Raises:
        ValueError: a guess or a factor that cannot be.
    """
    if not (guess > 0 and 0 < most < math.inf and within > 1):
        raise ValueError(
            f"a capacity search needs rates above 0 and a factor above 1, got {guess}, {most} and {within}"
        )
    low, high, trials, rate = 0.0, math.inf, 0, min(guess, most)
    while trials < MOST_TRIALS and high > within * low and low < most:
        trials += 1
        if holds(rate):
            low = rate
        else:
            high = rate
        rate = min(most, STEP * low) if math.isinf(high) else math.sqrt(low * high) if low else high / STEP
    return Capacity(low, high, trials)
