"""How long a text may get before recall falls, what each freedom of a plan is worth, and what is left at unseen lengths.

The first two repeat experiments of MoA's paper (arXiv 2406.14909: the effective context length, and table 3); the third is
what elastic spans are for. Spans are equal on average wherever ways of choosing them are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.demo.language import Family
from moa.eval.conditions import measured_as
from moa.eval.effective_context import ContextRow
from moa.eval.recall import WORDS_PER_QUESTION, recall
from moa.eval.records import DENSE, RecallTask, Score
from moa.hf.apply import apply
from moa.hf.shape import model_shape
from moa.optimize.baselines import baseline_plan
from moa.optimize.grid import rule_grid, span_table
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import AssignmentProblem
from moa.optimize.solve import solve
from moa.plan import Calibration, ModelShape, Plan
from moa.planning import assignment_problem, make_plan
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.collect import InfluenceSettings, profile_length
from moa.profile.data import digest
from moa.profile.supervise import supervise
from moa.profile.synthetic import synthetic_samples
from moa.settings import CompressSettings
from moa.stages import Workspace, key_of

EFFECTIVE, SEARCH, CARRIED = "effective context", "search space", "unseen lengths"
UNIFORM, PLAN, FIXED, SHARE, REPLANNED = "uniform", "plan", "heads", "uniform share", "heads, made anew"
# `single` asks one question a text: as many questions as the others' would take twenty times as long.
FAMILIES: tuple[Family, ...] = ("multikey", "multivalue")
MOST_QUESTIONS = 24
# Lengths at which the uniform span is measured besides, in average spans: there its recall falls below the level.
FINE = (1.0625, 1.125, 1.25)
LOST = 4  # and above so many it is measured no more


@dataclass(frozen=True, slots=True)
class Search:
    """What the optimizer may choose from: `--no-elastic` and `--per-layer` of `moa compress`."""

    elastic: bool
    per_layer: bool


# Each allows more than the one before, as in the paper's table 3; its first row is the uniform span.
SEARCHES: Mapping[str, Search] = {
    "layers": Search(elastic=False, per_layer=True),
    FIXED: Search(elastic=False, per_layer=False),
    "elastic": Search(elastic=True, per_layer=False),
}


@dataclass(frozen=True, slots=True)
class ContextBench:
    """What is measured.

    Args:
        spans_tokens: average spans of the effective context length.
        lengths_tokens: where it is looked for.
        profile_lengths: what its plans, and those of the search spaces, are made from.
        search_lengths: where search spaces are compared.
        densities: their budgets.
        short_lengths: profiled for plans that are asked at longer lengths.
        carried_lengths: where those are asked.
        carried_densities: their budgets.
        seeds: of calibration; the effective context length takes the first.
        num_samples: calibration texts per length.
        questions: about so many at each length.
        sink_tokens, min_span_tokens: of all plans.
    """

    spans_tokens: tuple[int, ...] = (128, 256, 512, 1024)
    lengths_tokens: tuple[int, ...] = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 4608, 5120)
    profile_lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    search_lengths: tuple[int, ...] = (2048, 4096)
    densities: tuple[float, ...] = (0.03125, 0.0625, 0.125, 0.25, 0.5)
    short_lengths: tuple[int, ...] = (256, 512, 1024)
    carried_lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    carried_densities: tuple[float, ...] = (0.125, 0.25)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_samples: int = 16
    questions: int = 240
    sink_tokens: int = 8
    min_span_tokens: int = 16

    def task(self, length_tokens: int) -> RecallTask:
        """As many texts as have the wanted number of questions together."""
        per_text = max(1, min(MOST_QUESTIONS, (length_tokens - 8) // WORDS_PER_QUESTION))
        texts = math.ceil(self.questions / len(FAMILIES) / per_text)
        return RecallTask(families=FAMILIES, texts_per_family=texts, questions_per_text=MOST_QUESTIONS)


def plan_for_span(
    profile: Profile, n_tokens: int, span_tokens: float, search: Search, worker: MilpWorker | None = None
) -> Plan:
    """The plan of least predicted loss at one length with at most `span_tokens` on average there.

    Raises:
        InfeasibleError: the least span is longer.
    """
    asked = CompressSettings(
        density=min(1.0, span_tokens / n_tokens), lengths_tokens=(n_tokens,), sink_tokens=profile.sink_tokens,
        min_span_tokens=profile.min_span_tokens, **asdict(search),
    )  # fmt: skip
    rules = rule_grid((n_tokens,), *asked.spans, elastic=search.elastic)
    problem = AssignmentProblem(
        loss=profile.rule_losses_at(n_tokens, rules)[None],
        spans=span_table(rules, (n_tokens,), profile.min_span_tokens),
        budget_lengths=(n_tokens,),
        density_budget=(asked.density,),
        max_rules_per_layer=asked.max_rules_per_layer,
        loss_lengths=(n_tokens,),
        per_layer=search.per_layer,
    )
    return make_plan(solve(problem, worker=worker, always_milp=False), rules, problem, profile, asked)


def bench_context(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, settings: ContextBench, workspace: Workspace
) -> tuple[ContextRow, ...]:
    """Measure one model; profiles, plans and recall that `workspace` holds are not made again.

    Raises:
        DataError: a length is too short for questions.
        InfeasibleError: a budget is below the least span.
    """
    shape = model_shape(model, name)
    with MilpWorker() as worker:
        bench = _Bench(model, tokenizer, shape, settings, workspace, measured_as(model, tokenizer, shape), worker)
        return (*bench.effective(), *bench.searches(), *bench.carried())


@dataclass(frozen=True, slots=True)
class _Bench:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    settings: ContextBench
    workspace: Workspace
    setting: dict[str, object]
    worker: MilpWorker
    _profiles: dict[tuple[int, int], LengthProfile] = field(default_factory=dict)

    def effective(self) -> Iterator[ContextRow]:
        """Dense, and at every average span the uniform span and a plan for each length, where they are not dense."""
        s = self.settings
        for n in s.lengths_tokens:
            yield self.row(EFFECTIVE, DENSE, n, None)
        for span in s.spans_tokens:
            for n in sorted({*s.lengths_tokens, *(round(factor * span) for factor in FINE)}):
                if span < n <= LOST * span:
                    yield self.row(EFFECTIVE, UNIFORM, n, self._window(span), budget=span)
            for n in s.lengths_tokens:
                if n > span:
                    plan = self._plan(s.seeds[0], s.profile_lengths, n, span, SEARCHES["elastic"])
                    yield self.row(EFFECTIVE, PLAN, n, plan, s.seeds[0], span, s.profile_lengths)

    def searches(self) -> Iterator[ContextRow]:
        """Every search space at every density, each plan made for the length at which it is asked."""
        s = self.settings
        for n in s.search_lengths:
            yield self.row(SEARCH, DENSE, n, None)
            for density in s.densities:
                yield self.row(SEARCH, UNIFORM, n, self._window(int(density * n)), budget=density)
                for method, search in SEARCHES.items():
                    for seed in s.seeds:
                        plan = self._plan(seed, s.profile_lengths, n, density * n, search)
                        yield self.row(SEARCH, method, n, plan, seed, density, s.profile_lengths)

    def carried(self) -> Iterator[ContextRow]:
        """One plan for all lengths, from profiles at short ones."""
        s = self.settings
        for n in s.carried_lengths:
            yield self.row(CARRIED, DENSE, n, None)
        for density in s.carried_densities:
            yield from self._rows(SHARE, None, density, self._share(density))
            for seed in s.seeds:
                plans = {method: self._compressed(seed, density, SEARCHES[method]) for method in (FIXED, "elastic")}
                for method, plan in plans.items():
                    yield from self._rows(method, seed, density, plan)
                for n in s.carried_lengths:
                    span = plans["elastic"].span_rules.density_ratio(n) * n
                    plan = self._plan(seed, s.short_lengths, n, span, SEARCHES[FIXED])
                    yield self.row(CARRIED, REPLANNED, n, plan, seed, density, s.short_lengths)

    def _rows(self, method: str, seed: int | None, density: float, plan: Plan) -> Iterator[ContextRow]:
        profiled = () if seed is None else self.settings.short_lengths
        for n in self.settings.carried_lengths:
            yield self.row(CARRIED, method, n, plan, seed, density, profiled)

    def _window(self, span_tokens: int) -> Plan:
        s = self.settings
        spans = {"sink_tokens": s.sink_tokens, "min_span_tokens": s.min_span_tokens}
        return Plan.uniform(self.shape, span_tokens, 0.0, **spans)

    def _share(self, density: float) -> Plan:
        s = self.settings
        return baseline_plan(
            "uniform",
            self.shape,
            density,
            s.short_lengths,
            sink_tokens=s.sink_tokens,
            min_span_tokens=s.min_span_tokens,
        )

    def _plan(self, seed: int, lengths: tuple[int, ...], n_tokens: int, span_tokens: float, search: Search) -> Plan:
        """`plan_for_span`, from a profile of these lengths."""

        def make() -> object:
            return plan_for_span(self._profile(seed, lengths), n_tokens, span_tokens, search, self.worker).to_json()

        key = self.key(seed=seed, lengths=lengths, n_tokens=n_tokens, span_tokens=span_tokens, search=asdict(search))
        return self.workspace.json_unit("plan", key, make, _plan_from)

    def _compressed(self, seed: int, density: float, search: Search) -> Plan:
        """What `moa compress` minimises, without a trial of candidates: one budget at all profiled lengths and one unseen."""
        s = self.settings
        asked = CompressSettings(
            density=density, lengths_tokens=s.short_lengths, num_samples=s.num_samples, seed=seed,
            sink_tokens=s.sink_tokens, min_span_tokens=s.min_span_tokens, **asdict(search),
        )  # fmt: skip

        def make() -> object:
            profile = self._profile(seed, s.short_lengths)
            rules, problem = assignment_problem(profile, asked)
            found = solve(problem, worker=self.worker, always_milp=False)
            return make_plan(found, rules, problem, profile, asked).to_json()

        return self.workspace.json_unit("plan", self.key(asked=asdict(asked)), make, _plan_from)

    def _profile(self, seed: int, lengths: Sequence[int]) -> Profile:
        s = self.settings
        found = tuple(self._at_length(seed, n) for n in lengths)
        return Profile(self.shape, self._calibration(seed, lengths), s.sink_tokens, s.min_span_tokens, found)

    def _at_length(self, seed: int, n_tokens: int) -> LengthProfile:
        if (seed, n_tokens) not in self._profiles:
            self._profiles[seed, n_tokens] = self._measured(seed, n_tokens)
        return self._profiles[seed, n_tokens]

    def _measured(self, seed: int, n_tokens: int) -> LengthProfile:
        s, influence = self.settings, InfluenceSettings()
        texts = synthetic_samples(self.tokenizer, n_tokens, s.num_samples, seed)

        def on_sample(done: int) -> None:
            self.workspace.progress(f"profile {n_tokens} tokens, seed {seed}", done, len(texts))

        def make() -> Profile:
            answered = tuple(supervise(self.model, texts))
            spans = (s.sink_tokens, s.min_span_tokens)
            found = profile_length(self.model, answered, n_tokens, *spans, influence, on_sample)
            return Profile(self.shape, self._calibration(seed, (n_tokens,)), *spans, (found,))

        key = self.key(seed=seed, texts=digest(texts), influence=asdict(influence))
        return self.workspace.unit("profile", key, ".safetensors", make, Profile.save, Profile.load).lengths[0]

    def _calibration(self, seed: int, lengths: Sequence[int]) -> Calibration:
        return Calibration(
            dataset="synthetic", dataset_sha256="0" * 64, samples_per_length=self.settings.num_samples,
            lengths_tokens=tuple(lengths), seed=seed, estimator="joint", supervision="model", weighting="token",
        )  # fmt: skip

    def key(self, **inputs: object) -> str:
        """The key of a unit with these inputs of its own."""
        s = self.settings
        return key_of(setting=self.setting, spans=[s.sink_tokens, s.min_span_tokens], samples=s.num_samples, **inputs)

    def row(
        self,
        experiment: str,
        method: str,
        n_tokens: int,
        plan: Plan | None,
        seed: int | None = None,
        budget: float | None = None,
        profiled: Sequence[int] = (),
    ) -> ContextRow:
        """Recall at one length; a unit, so that equal plans of several experiments are measured once."""
        task = self.settings.task(n_tokens)

        def make() -> object:
            with apply(self.model, plan) if plan else nullcontext():
                score = recall(self.model, self.tokenizer, (n_tokens,), task)[0].overall
            return score.model_dump()

        key = self.key(rules=plan.rules if plan else None, task=task.model_dump(mode="json"), n_tokens=n_tokens)
        found = self.workspace.json_unit("recall", key, make, _score_from)
        self.workspace.progress(f"{experiment}: {method} at {n_tokens} tokens", 1, 1)
        kept = plan.span_rules.density_ratio(n_tokens) * n_tokens if plan else float(n_tokens)
        longest = max(profiled, default=None)
        return ContextRow(
            experiment, method, seed, budget, longest, n_tokens, kept, found.questions, found.right,
            found.accuracy_ratio, found.low_ratio, found.high_ratio, plan.sha256[:12] if plan else "",
        )  # fmt: skip


def _plan_from(content: object) -> Plan:
    return Plan.from_json(str(content), "plan")


def _score_from(content: Any) -> Score:
    return Score.model_validate(content)
