"""The measurements of `moa bench serve` on one model: what a step takes, every policy at one rate, and each one's capacity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moa.eval.serving.capacity import Capacity, find_capacity
from moa.eval.serving.cases import Ask
from moa.eval.serving.drive import Run, Served, Subject, drive
from moa.eval.serving.subjects import SARATHI, Contestant, Open
from moa.eval.serving.summary import share_over, summary, values_s
from moa.eval.serving.workload import Lengths, Load, Workload

# Sarathi-Serve's strict target: five decode steps with nothing between them. Of so many requests, as run together here.
SLO_STEPS, STEP_BATCH, STEP_TOKENS = 5.0, 8, 24
SLO_SHARE = 0.01  # of gaps may be longer: the 99th percentile
# Sarathi-Serve calls a load sustained while the median request waits no longer than 20 strict targets (2 s for 0.1 s).
WAIT_SLOS = 20.0
BUDGETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# A step of decodes and a chunk is meant to take so much of the target, so that the tail keeps it too.
BUDGET_SHARE = 0.6
PROBE_TOKENS = 256
# Of what the machine can do at most: a load that every policy can follow.
EQUAL_SHARE = 0.65
CAPACITY_WITHIN = 1.25


@dataclass(frozen=True, slots=True)
class Setup:
    """What a model's runs have in common.

    Args:
        open_one: makes subjects.
        vocabulary: of prompts.
        context_tokens: prompt and output together at most.
        step_s: a decode step of `STEP_BATCH` requests.
        token_budget: for policies that cut prompts.
    """

    open_one: Open
    vocabulary: int
    context_tokens: int | None
    step_s: float
    token_budget: int

    @property
    def slo_s(self) -> float:
        """The strict target for the 99th percentile of times between tokens."""
        return SLO_STEPS * self.step_s

    @property
    def wait_s(self) -> float:
        """The median time to first token of a load that is sustained is at most this."""
        return WAIT_SLOS * self.slo_s

    def loads(self, ask: Ask, rate: float, seed: int) -> tuple[Load, ...]:
        """Requests of a run."""
        return ask.requests(self.vocabulary, rate, seed, self.context_tokens)


@dataclass(frozen=True, slots=True)
class Trial:
    """A run at a rate, and whether it kept the targets."""

    rate: float
    run: Run
    holds: bool
    about: Mapping[str, object]


def set_up(open_one: Open, vocabulary: int, context_tokens: int | None, policy: str = SARATHI) -> Setup:
    """Time a decode step, and find the largest token budget whose steps leave room below five of them.

    A budget's step is held against a decode step right before it, and twice before it counts as too long: machines change
    their speed.
    """
    who, best = Contestant(policy), BUDGETS[0]
    steps = [_decode_step_s(open_one, who, vocabulary)]

    def leaves_room(budget: int) -> bool:
        steps.append(_decode_step_s(open_one, who, vocabulary))
        with open_one(who, budget) as subject:
            return _hybrid_step_s(subject, budget, vocabulary) <= BUDGET_SHARE * SLO_STEPS * steps[-1]

    for budget in BUDGETS:
        if context_tokens is not None and _probe_prompt(budget) >= context_tokens:
            break
        if not (leaves_room(budget) or leaves_room(budget)):
            break
        best = budget
    return Setup(open_one, vocabulary, context_tokens, statistics.median(steps), best)


def sustained_rate(setup: Setup, ask: Ask, who: Contestant, seed: int) -> float:
    """Requests per second when all are there from the start."""
    with setup.open_one(who, setup.token_budget) as subject:
        run = drive(subject, setup.loads(ask, math.inf, seed))
    rate: float = summary(run)["request_throughput"]
    return rate


def run_at(setup: Setup, ask: Ask, who: Contestant, rate: float, seed: int, *, may_stop: bool = False) -> Trial:
    """One run; with `may_stop` it ends as soon as it cannot keep the targets any more."""
    loads = setup.loads(ask, rate, seed)
    with setup.open_one(who, setup.token_budget) as subject:
        watch = _Watch(setup, loads)
        run = drive(subject, loads, give_up=watch if may_stop else None)
    return Trial(rate, run, holds(setup, run), subject.about)


def holds(setup: Setup, run: Run) -> bool:
    """Whether a run kept the strict target and was sustained: all ended, and the median one did not wait long."""
    if run.is_given_up or any(not one.has_succeeded for one in run.served):
        return False
    waits = values_s(run, "ttft")
    return share_over(values_s(run, "itl"), setup.slo_s) <= SLO_SHARE and statistics.median(waits) <= setup.wait_s


def capacity_of(
    setup: Setup, ask: Ask, who: Contestant, guess: float, seed: int, tell: Callable[[Trial], None]
) -> Capacity:
    """The highest rate at which a contestant keeps the targets.

    A rate above what it gets done when all requests are there from the start cannot be sustained, whatever a short run
    says, so none is tried.
    """

    def try_rate(rate: float) -> bool:
        trial = run_at(setup, ask, who, rate, seed, may_stop=True)
        tell(trial)
        return trial.holds

    return find_capacity(try_rate, guess, most=sustained_rate(setup, ask, who, seed), within=CAPACITY_WITHIN)


class _Watch:
    """Says when a run has missed the targets for good: more gaps too long, or more late, than all together may be."""

    def __init__(self, setup: Setup, loads: Sequence[Load]) -> None:
        self._setup = setup
        self._most_long = SLO_SHARE * sum(load.output_tokens - 1 for load in loads)
        self._most_late = len(loads) / 2
        self._long = self._late = 0

    def __call__(self, one: Served) -> bool:
        if len(one.chunk_s) == 1:
            self._late += one.ttft_s > self._setup.wait_s
        elif len(one.chunk_s) > 1:
            self._long += one.chunk_s[-1] - one.chunk_s[-2] > self._setup.slo_s
        return bool(one.error) or self._long > self._most_long or self._late > self._most_late


def _decodes(count: int, vocabulary: int, prompt: int = PROBE_TOKENS, tokens: int = STEP_TOKENS) -> tuple[Load, ...]:
    lengths = Lengths(prompt, prompt), Lengths(tokens, tokens)
    return Workload(*lengths, count, vocabulary).requests(0)


def _decode_step_s(open_one: Open, who: Contestant, vocabulary: int) -> float:
    """A step of `STEP_BATCH` requests that decode, median."""
    with open_one(who, BUDGETS[-1]) as subject:
        drive(subject, _decodes(1, vocabulary))  # the first run of anything is slow
        return statistics.median(values_s(drive(subject, _decodes(STEP_BATCH, vocabulary)), "itl"))


def _hybrid_step_s(subject: Subject, budget: int, vocabulary: int) -> float:
    """A step of decodes and a prompt's chunk that fill the budget, median of several: short requests, then a long prompt."""
    first = _decodes(STEP_BATCH - 1, vocabulary, prompt=1, tokens=_probe_chunks(budget) + 1)
    last = _decodes(1, vocabulary, prompt=_probe_prompt(budget), tokens=1)
    return statistics.median(values_s(drive(subject, (*first, *last)), "itl"))


def _probe_chunks(budget: int) -> int:
    return max(4, 2 * PROBE_TOKENS // budget)


def _probe_prompt(budget: int) -> int:
    """Tokens that fill so many steps beside decodes."""
    return _probe_chunks(budget) * (budget - STEP_BATCH + 1)
