"""How fast the optimizer proves how much, on problems of the size of large models: single points and whole fronts.

Losses are made up, so that the sizes are those of 70B (80 x 8 KV heads) and of 7B models without grouped queries (32 x 32).
`realistic`: heavy-tailed heads, half of them reaching a fixed distance and half a share of the text, losses that fall with
the span. `noisy`: every loss is a smooth fall times a normal number, so that neighbouring rules say nothing of each other.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from moa.errors import UsageError
from moa.eval.csv_rows import csv_rows
from moa.files import write_atomic
from moa.optimize.greedy import greedy
from moa.optimize.grid import rule_grid, span_table
from moa.optimize.instance import make_instance
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import Assignment, AssignmentProblem, Target
from moa.optimize.solve import solve
from moa.spans import ElasticRule
from moa.stages import Progress, silent

Kind = Literal["realistic", "noisy"]
LENGTHS = (4096, 8192, 16384, 32768)
SINK_TOKENS, MIN_SPAN_TOKENS = 32, 64
RULES = 100
POINT_DENSITIES = (0.25, 0.5)
FRONT_DENSITIES = (0.03125, 0.046875, 0.0625, 0.09375, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
REL_GAP = 1e-3
POINT_LIMIT_S = 58.0
FRONT_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class OptimizeBench:
    """What is solved: shapes (layers, KV heads), rules per layer (None for no limit), seeds."""

    shapes: tuple[tuple[int, int], ...] = ((80, 8), (32, 32))
    rules: int = RULES
    max_rules_per_layer: int | None = 2
    point_densities: tuple[float, ...] = POINT_DENSITIES
    front_densities: tuple[float, ...] = FRONT_DENSITIES
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One solve. `front_s` is the wall-clock time of the front so far; 0 for a single point."""

    run: Literal["point", "front"]
    losses: str
    layers: int
    kv_heads: int
    rules: int
    lengths: int
    max_rules_per_layer: int | None
    density_budget_ratio: float
    value: float
    bound: float
    gap_ratio: float
    greedy_gap_ratio: float
    solver: str
    milp_status: str
    solve_s: float
    front_s: float


def bench_optimize(settings: OptimizeBench, progress: Progress = silent) -> list[Row]:
    """Solve every point alone, with the solver process started anew, then every front with one process."""
    cases = [(kind, shape) for kind in get_args(Kind) for shape in settings.shapes]
    total = len(cases) * (len(settings.point_densities) + len(settings.front_densities))
    rows: list[Row] = []
    for kind, shape in cases:
        for row in chain(_points(kind, shape, settings), _front(kind, shape, settings)):
            rows.append(row)
            progress("optimize", len(rows), total)
    return rows


def made_up_problem(
    kind: Kind, layers: int, kv_heads: int, density: float, *, rules: int, limit: int | None, seed: int
) -> AssignmentProblem:
    """A problem of so many layers, KV heads and rules with losses at four lengths; see the module for the kinds."""
    grid = bench_rules(rules)
    spans = span_table(grid, LENGTHS, MIN_SPAN_TOKENS)  # [C, R]
    share = (spans / np.array(LENGTHS)[:, None])[:, None, None, :]  # [E, 1, 1, R]
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0, 0.7, (layers, 1, 1)) * (0.05 + rng.pareto(1.2, (layers, kv_heads, 1)))  # [L, HKV, 1]
    if kind == "noisy":
        noise = rng.standard_normal((len(LENGTHS), layers, kv_heads, len(grid)))
        loss = weight * np.exp(-3 * share) * np.maximum(0, 1 + noise)
    else:
        drift = rng.lognormal(0, 0.3, (len(LENGTHS), layers, kv_heads, 1))
        reach = np.exp(rng.uniform(np.log(128), np.log(LENGTHS[-1]), (layers, kv_heads, 1)))  # tokens
        steepness = rng.uniform(1, 12, (layers, kv_heads, 1))
        near = rng.random((layers, kv_heads, 1)) < 0.5
        fall = np.where(near, np.exp(-spans[:, None, None, :] / reach), np.exp(-steepness * share))
        loss = weight * drift * fall * (1 - share)
    budgets = (density,) * len(LENGTHS)
    return AssignmentProblem(np.ascontiguousarray(loss), spans, LENGTHS, budgets, limit, LENGTHS)


def bench_rules(count: int) -> tuple[ElasticRule, ...]:
    """So many rules whose spans differ at some length: of the usual grid, filled up with shares of the length."""
    every = [*rule_grid(LENGTHS, SINK_TOKENS, MIN_SPAN_TOKENS), *(ElasticRule(0, i / 96) for i in range(1, 96))]
    spans = span_table(every, LENGTHS, MIN_SPAN_TOKENS).T.tolist()
    distinct = list({tuple(column): rule for column, rule in reversed(list(zip(spans, every, strict=True)))}.values())
    if len(distinct) < count:
        raise UsageError(f"there are {len(distinct)} different rules to take, {count} were asked for")
    kept = np.linspace(0, len(distinct) - 1, count).round().astype(int)
    return tuple(distinct[i] for i in kept)


def _points(kind: Kind, shape: tuple[int, int], settings: OptimizeBench) -> Iterator[Row]:
    for density in settings.point_densities:
        problem = _problem(kind, shape, density, settings)
        found = solve(problem, rel_gap=REL_GAP, time_limit_s=POINT_LIMIT_S, always_milp=False)
        yield _row("point", kind, problem, found, 0.0)


def _front(kind: Kind, shape: tuple[int, int], settings: OptimizeBench) -> Iterator[Row]:
    started = time.monotonic()
    with MilpWorker() as worker:
        for density in settings.front_densities:
            problem = _problem(kind, shape, density, settings)
            found = solve(problem, rel_gap=REL_GAP, time_limit_s=FRONT_LIMIT_S, worker=worker, always_milp=False)
            yield _row("front", kind, problem, found, time.monotonic() - started)


def _problem(kind: Kind, shape: tuple[int, int], density: float, settings: OptimizeBench) -> AssignmentProblem:
    return made_up_problem(
        kind, *shape, density, rules=settings.rules, limit=settings.max_rules_per_layer, seed=settings.seed
    )


def _row(run: Literal["point", "front"], kind: Kind, problem: AssignmentProblem, found: Assignment, s: float) -> Row:
    instance = make_instance(problem, Target.balanced(problem))
    plain = greedy(instance) if run == "point" else None
    alone = np.nan if plain is None else instance.value(instance.cost_of(plain)) / found.bound - 1
    lengths, layers, kv_heads, rules = problem.loss.shape
    return Row(
        run=run,
        losses=kind,
        layers=layers,
        kv_heads=kv_heads,
        rules=rules,
        lengths=lengths,
        max_rules_per_layer=problem.max_rules_per_layer,
        density_budget_ratio=problem.density_budget[0],
        value=found.value,
        bound=found.bound,
        gap_ratio=found.gap_ratio,
        greedy_gap_ratio=float(alone),
        solver=found.solver,
        milp_status=found.milp_status,
        solve_s=found.solve_s,
        front_s=s,
    )


def write_bench(rows: Sequence[Row], settings: OptimizeBench, folder: Path) -> None:
    """Write `optimize.csv` and a page with the conditions."""
    write_atomic(folder / "optimize.csv", csv_rows(rows, Row))
    write_atomic(folder / "README.md", page(rows, settings).encode())


def page(rows: Sequence[Row], settings: OptimizeBench) -> str:
    """Markdown: what was solved, on what, and the figures."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("moa", "cvxpy", "highspy", "numpy"))
    conditions = (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {versions}. {rows[0].rules} rules, losses at {rows[0].lengths} lengths, budgets at "
        f"each, at most {settings.max_rules_per_layer} rules per layer, seed {settings.seed}. Losses are made up: "
        "`realistic` ones fall with the span and have heavy tails over heads; `noisy` ones are adversarial, each rule's "
        "loss independent of its neighbours'. The gap is proven, (value - bound) / value; asked for was at most "
        f"{REL_GAP:.1%}. A point starts its own solver process, a front shares one; HiGHS runs on one thread, and not at "
        "all (`not needed`) where the Lagrangian bound proves enough."
    )
    lines = [
        "# Optimizer at the size of large models",
        "",
        "    moa bench optimize -o recipes/benchmarks/optimize --overwrite",
        "",
        conditions,
        "",
        "## Points",
        "",
        "| losses | layers x KV heads | density | seconds | proven gap | made by | HiGHS | greedy alone above the bound |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r.losses} | {r.layers} x {r.kv_heads} | {r.density_budget_ratio:g} | {r.solve_s:.1f} | {r.gap_ratio:.3%} "
            f"| {r.solver} | {r.milp_status} | {r.greedy_gap_ratio:.1%} |"
            for r in rows
            if r.run == "point"
        ),
        "",
        "## Fronts",
        "",
        "| losses | layers x KV heads | distinct points | seconds in all | largest proven gap |",
        "|---|---|---|---|---|",
        *_front_lines(rows),
        "",
        "Every solve: [optimize.csv](optimize.csv).",
    ]
    return "\n".join(lines) + "\n"


def _front_lines(rows: Sequence[Row]) -> Iterator[str]:
    front = [row for row in rows if row.run == "front"]
    for kind, layers, kv_heads in dict.fromkeys((r.losses, r.layers, r.kv_heads) for r in front):
        of = [r for r in front if (r.losses, r.layers, r.kv_heads) == (kind, layers, kv_heads)]
        yield (
            f"| {kind} | {layers} x {kv_heads} | {len({r.value for r in of})} | {max(r.front_s for r in of):.0f} "
            f"| {max(r.gap_ratio for r in of):.3%} |"
        )
