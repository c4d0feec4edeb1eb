"""`moa bench serve`: every policy at one rate and at the highest each can keep, several turns, within one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moa.eval.serving.capacity import Capacity
from moa.eval.serving.cases import Case
from moa.eval.serving.rows import CAPACITY, EQUAL, Row, row_of
from moa.eval.serving.stages import EQUAL_SHARE, Setup, Trial, capacity_of, run_at, set_up, sustained_rate
from moa.eval.serving.subjects import ORCA, PREFILL_FIRST, SARATHI, Contestant, Open, contestants, opener, sizes
from moa.eval.serving.summary import Keys, finite, summary, values_s
from moa.plan import Plan
from moa.stages import Progress

POLICIES = (SARATHI, PREFILL_FIRST, ORCA)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured: turns with a seed each, policies, and a plan that the first of them also runs under."""

    turns: int = 3
    seed: int = 0
    policies: tuple[str, ...] = POLICIES
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The capacity of a contestant in a turn."""

    model: str
    subject: str
    turn: int
    capacity: Capacity


@dataclass(slots=True)
class Results:
    """Everything that was measured, and under what setup each turn of a model ran.

    `gaps_s` are times between tokens of the runs at one rate, pooled over turns, by model and subject.
    """

    rows: list[Row] = field(default_factory=list)
    runs: list[Keys] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    setups: dict[str, list[Setup]] = field(default_factory=dict)
    cases: dict[str, Case] = field(default_factory=dict)
    gaps_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, row: Row, trial: Trial) -> None:
        """Keep a run."""
        self.rows.append(row)
        told = {"model": row.model, "subject": row.subject, "stage": row.stage, "turn": row.turn, "holds": row.holds}
        self.runs.append({"request_rate": finite(row.rate), **summary(trial.run), "moa": {**told, **trial.about}})


def bench_serve(cases: Sequence[Case], settings: Settings, progress: Progress) -> Results:
    """Measure models one after the other."""
    results = Results()
    for case in cases:
        model = case.make()
        bench_case(case, opener(model, settings.plan), *sizes(model), settings, results, progress)
    return results


def bench_case(
    case: Case,
    open_one: Open,
    vocabulary: int,
    context_tokens: int | None,
    settings: Settings,
    results: Results,
    progress: Progress,
) -> None:
    """All stages on one model; subjects take turns, so that what changes on the machine falls on all alike."""
    who = contestants(settings.policies, has_plan=settings.plan is not None)
    done, total = 0, settings.turns * 2 * len(who)
    results.cases[case.name], setups = case, results.setups.setdefault(case.name, [])
    guesses = dict.fromkeys(who, math.inf)  # all begin at the top
    for turn in range(settings.turns):
        setup = set_up(open_one, vocabulary, context_tokens)
        setups.append(setup)
        most = sustained_rate(setup, case.long, who[0], settings.seed + turn)
        for one in _in_turn(who, turn):
            trial = run_at(setup, case.long, one, EQUAL_SHARE * most, settings.seed + turn)
            _keep(results, setup, (case.name, one.name, EQUAL, turn), trial)
            results.gaps_s.setdefault((case.name, one.name), []).extend(values_s(trial.run, "itl"))
            progress(case.name, done := done + 1, total)
        for one in _in_turn(who, turn):
            keep = _keeper(results, setup, (case.name, one.name, CAPACITY, turn))
            capacity = capacity_of(setup, case.chat, one, guesses[one], settings.seed + turn, keep)
            results.found.append(Found(case.name, one.name, turn, capacity))
            guesses[one] = capacity.holds if math.isfinite(capacity.fails) and capacity.holds else guesses[one]
            progress(case.name, done := done + 1, total)


def _in_turn(who: Sequence[Contestant], turn: int) -> Sequence[Contestant]:
    """Forwards and backwards."""
    return who[:: -1 if turn % 2 else 1]


def _keeper(results: Results, setup: Setup, names: tuple[str, str, str, int]) -> Callable[[Trial], None]:
    return lambda trial: _keep(results, setup, names, trial)


def _keep(results: Results, setup: Setup, names: tuple[str, str, str, int], trial: Trial) -> None:
    row = row_of(names, trial.rate, trial.run, summary(trial.run), setup.slo_s, holds=trial.holds)
    results.add(row, trial)
