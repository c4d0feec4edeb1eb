"""What is asked of a server, and when: requests drawn from distributions, the same for every subject that is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moa.errors import UsageError

# 90 % of a normal distribution lie below so many standard deviations.
P90_SIGMAS = 1.2815515655446004
# Token ids below this are special ones in most vocabularies.
FIRST_TOKEN = 3
NO_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths in tokens, told by median and 90th percentile; one number for all where the two are equal.

    Raises:
        UsageError: a percentile below the median, or a range that does not hold the median.
    """

    median: float
    p90: float
    least: int = 1
    most: int = NO_LIMIT

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.median <= min(self.p90, self.most):
            raise UsageError(
                f"lengths need 1 <= least <= median <= p90 and most, got {self.least}, {self.median:g}, {self.p90:g}, "
                f"{self.most}"
            )

    def draw(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Lengths [count]."""
        sigma = math.log(self.p90 / self.median) / P90_SIGMAS
        drawn = self.median * np.exp(sigma * generator.standard_normal(count))
        return np.clip(np.rint(drawn), self.least, self.most).astype(np.int64)

    def __str__(self) -> str:
        if self.median == self.p90:
            return f"{self.median:g}"
        most = "" if self.most == NO_LIMIT else f", at most {self.most:,}"
        return f"median {self.median:g}, P90 {self.p90:g}{most}"


@dataclass(frozen=True, slots=True)
class Load:
    """One request: when it is due, in seconds from the start, what it says and how many tokens it wants."""

    due_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to come.

    Args:
        prompts, outputs: lengths in tokens.
        count: of requests.
        vocabulary: token ids are drawn below it.
        rate: requests per second; infinite for all at once (offline, or a closed loop under `max_concurrency`).
        burstiness: 1 for Poisson arrivals, lower for burstier ones (gamma distributed gaps, as in vLLM's benchmark).
        burst: so many requests arrive together.
        max_concurrency: requests in flight at most, so that others wait at the client; None for an open loop.
        context_tokens: prompt and output together at most: a longer prompt is cut.
    """

    prompts: Lengths
    outputs: Lengths
    count: int
    vocabulary: int
    rate: float = math.inf
    burstiness: float = 1.0
    burst: int = 1
    max_concurrency: int | None = None
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        wrong = self.count < 1 or self.burst < 1 or (self.max_concurrency is not None and self.max_concurrency < 1)
        if wrong or not self.rate > 0 or not self.burstiness > 0 or self.vocabulary <= FIRST_TOKEN:
            raise UsageError(
                "a workload needs at least one request, a rate and a burstiness above 0, bursts and a concurrency of 1 "
                f"or more, and more than {FIRST_TOKEN} token ids; got {self}"
            )

    def requests(self, seed: int) -> tuple[Load, ...]:
        """The requests in order of arrival; a seed has the same ones at any rate, only closer together."""
        kinds = np.random.SeedSequence(seed).spawn(3)
        lengths, gaps, texts = (np.random.default_rng(kind) for kind in kinds)
        prompts, outputs = self.prompts.draw(lengths, self.count), self.outputs.draw(lengths, self.count)
        if self.context_tokens is not None:
            outputs = np.minimum(outputs, self.context_tokens - 1)
            prompts = np.minimum(prompts, self.context_tokens - outputs)
        return tuple(
            Load(float(due), tuple(texts.integers(FIRST_TOKEN, self.vocabulary, n).tolist()), int(wanted))
            for due, n, wanted in zip(self._dues(gaps), prompts, outputs, strict=True)
        )

    def _dues(self, generator: np.random.Generator) -> NDArray[np.float64]:
        """Arrivals [count]; their mean gap is the rate's to the last digit, as in vLLM's benchmark."""
        if math.isinf(self.rate):
            return np.zeros(self.count)
        groups = -(-self.count // self.burst)
        gaps = generator.gamma(self.burstiness, 1.0, groups)  # [groups]
        dues = np.cumsum(gaps) * groups * self.burst / self.rate / gaps.sum()
        return np.repeat(dues - dues[0], self.burst)[: self.count]
