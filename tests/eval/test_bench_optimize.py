"""The benchmark's problems are what it says, and its page and table hold what was solved."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from moa.eval.bench_optimize import (
    LENGTHS,
    REL_GAP,
    OptimizeBench,
    Row,
    bench_optimize,
    bench_rules,
    made_up_problem,
    page,
)
from moa.eval.csv_rows import csv_rows
from moa.optimize.grid import span_table

SMALL = OptimizeBench(shapes=((3, 4),), rules=24, point_densities=(0.25,), front_densities=(0.1, 0.5))


@pytest.mark.parametrize("count", [24, 100, 120])
def test_rules_are_as_many_as_asked_and_all_different(count: int) -> None:
    rules = bench_rules(count)
    assert len(rules) == count
    assert len({tuple(column) for column in span_table(rules, LENGTHS, 64).T.tolist()}) == count


def test_realistic_losses_fall_with_the_span_and_have_heavy_tails() -> None:
    problem = made_up_problem("realistic", 32, 32, 0.25, rules=100, limit=2, seed=0)
    order = np.argsort(problem.spans[3], kind="stable")
    assert (np.diff(problem.loss[3][..., order], axis=-1) <= 1e-12).all()
    worst = np.sort(problem.loss[3].max(axis=-1).ravel())
    assert worst[-len(worst) // 10 :].sum() > 0.4 * worst.sum()
    noisy = made_up_problem("noisy", 32, 32, 0.25, rules=100, limit=2, seed=0)
    assert (np.diff(noisy.loss[3][..., order], axis=-1) > 0).mean() > 0.3


def test_every_solve_is_a_row_within_the_gap() -> None:
    rows = bench_optimize(SMALL)
    assert [(r.run, r.losses) for r in rows] == [
        ("point", "realistic"), ("front", "realistic"), ("front", "realistic"),
        ("point", "noisy"), ("front", "noisy"), ("front", "noisy"),
    ]  # fmt: skip
    assert all(0 <= r.gap_ratio <= REL_GAP and r.bound <= r.value for r in rows)
    assert [row["density_budget_ratio"] for row in csv.DictReader(io.StringIO(csv_rows(rows, Row).decode()))][:3] == [
        "0.25",
        "0.1",
        "0.5",
    ]
    text = page(rows, SMALL)
    assert "| realistic | 3 x 4 | 2 |" in text
    assert "moa bench optimize -o" in text
