"""Small and large random problems, their exact answers by enumeration, and one solver process for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest

from moa.optimize.grid import rule_grid, span_table
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import AssignmentProblem, Target, fits_budgets

LENGTHS = (1000, 3001, 8192)
MakeProblem = Callable[..., AssignmentProblem]
Enumerate = Callable[[AssignmentProblem, Target], float | None]


@pytest.fixture(scope="session")
def worker() -> Iterator[MilpWorker]:
    with MilpWorker() as process:
        yield process


def tiny(
    seed: int, limit: int | None = None, lengths: int = 2, layers: int = 2, kv_heads: int = 2, rules: int = 4
) -> AssignmentProblem:
    """Arbitrary spans and losses, also negative ones; the first rule always keeps the budgets."""
    rng = np.random.default_rng(seed)
    n = np.array(LENGTHS[:lengths])
    spans = rng.integers(1, n[:, None] + 1, (lengths, rules))
    spans[:, 0] = np.minimum(spans[:, 0], n // 5)
    budget = tuple(rng.choice([0.2, 0.3, 0.5, 0.7], lengths).tolist())
    loss = rng.lognormal(0, 2, (lengths, layers, kv_heads, rules)) - 0.1
    loss *= 10.0 ** rng.integers(-6, 6)
    return AssignmentProblem(loss, spans, LENGTHS[:lengths], budget, limit, LENGTHS[:lengths])


def realistic(
    seed: int,
    layers: int,
    kv_heads: int,
    density: float,
    limit: int | None = None,
    lengths: tuple[int, ...] = (4096, 8192, 16384),
    max_rules: int = 80,
) -> AssignmentProblem:
    """Losses that fall convexly with the span, heads of very different sensitivity, ten per cent noise."""
    rng = np.random.default_rng(seed)
    rules = rule_grid(lengths, 64, 128, max_rules=max_rules)
    spans = span_table(rules, lengths, 128)
    density_of_rule = (spans / np.array(lengths)[:, None])[:, None, None, :]  # [E, 1, 1, R]
    sensitivity = rng.lognormal(0, 1.5, (layers, kv_heads, 1)) * rng.lognormal(
        0, 0.3, (len(lengths), layers, kv_heads, 1)
    )
    loss = sensitivity * np.exp(-rng.uniform(1, 8, (layers, kv_heads, 1)) * density_of_rule)
    loss = np.maximum(loss * (1 + 0.1 * rng.standard_normal(loss.shape)), 0)
    return AssignmentProblem(loss, spans, lengths, (density,) * len(lengths), limit, lengths)


def enumerate_best(problem: AssignmentProblem, target: Target) -> float | None:
    """The least target value of any assignment, by trying them all; None if none keeps everything."""
    _, layers, kv_heads, rules = problem.loss.shape
    best: float | None = None
    for choice in product(range(rules), repeat=layers * kv_heads):
        picks = np.array(choice, dtype=np.int64).reshape(layers, kv_heads)
        if fits_budgets(problem, picks):
            losses = problem.losses(picks)
            if target.keeps_limits(losses) and (best is None or target.value(losses) < best):
                best = target.value(losses)
    return best


@pytest.fixture(scope="session")
def make_tiny() -> MakeProblem:
    return tiny


@pytest.fixture(scope="session")
def make_realistic() -> MakeProblem:
    return realistic


@pytest.fixture(scope="session")
def best_by_enumeration() -> Enumerate:
    return enumerate_best
