"""Random steps and rules for the planner's tests."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from moa.kernels.paged.splits import HeadRules, Step
from moa.spans import BETA_ONE, MAX_TOKENS


def make_heads(rng: np.random.Generator, layers: int, kv_heads: int, sink: int = 64) -> HeadRules:
    """Published kind of rules, dense ones and short windows among them; some with the model's own window."""
    n = int(rng.integers(1, 9))
    alpha = rng.choice([-1024, -100, 0, 64, 300, 1024, 8192], n)
    beta = rng.choice([0, 1, BETA_ONE // 8, BETA_ONE // 2, BETA_ONE], n)
    native = rng.choice([MAX_TOKENS, MAX_TOKENS, 1, 100, 4096], n)
    rule_of_head = rng.integers(0, n, (layers, kv_heads)).astype(np.int32)
    return HeadRules(
        np.stack((alpha, beta, native), 1).astype(np.int64), rule_of_head, sink, sink + int(rng.integers(1, 100))
    )


def make_step(rng: np.random.Generator, n_slices: int, group: int, most_tokens: int, longest: int = 1 << 17) -> Step:
    """Slices of 0 to `most_tokens` tokens after 0 to `longest` cached ones; some pinned."""
    tokens = rng.integers(0, most_tokens + 1, n_slices)
    position = np.floor(longest ** rng.uniform(0, 1, n_slices)) - 1
    pinned = np.where(rng.random(n_slices) < 0.3, position + tokens + rng.integers(1, 999, n_slices), 0)
    offset = np.cumsum(tokens) - tokens
    slices = np.stack((offset, tokens, position, np.arange(n_slices)), 1).astype(np.int32)
    return Step(slices, pinned.astype(np.int64), group)


@pytest.fixture(scope="session")
def steps() -> SimpleNamespace:
    """The helpers above; tests are no packages, so a fixture carries them."""
    return SimpleNamespace(make_heads=make_heads, make_step=make_step)
