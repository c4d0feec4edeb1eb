"""How good plans are, and how far profiles can be believed: estimators, baselines and an oracle on small models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.demo.language import ONE_HOP
from moa.eval.conditions import measured_as
from moa.eval.fidelity import Effects, fidelity, measure_effects
from moa.eval.oracle import oracle_plans
from moa.eval.recall import recall
from moa.eval.records import DENSE, RecallTask
from moa.hf.apply import apply
from moa.hf.shape import model_shape
from moa.optimize.baselines import baseline_plan
from moa.optimize.grid import rule_grid, span_table
from moa.optimize.problem import AssignmentProblem
from moa.optimize.solve import solve
from moa.plan import Calibration, ModelShape, Plan
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.collect import InfluenceSettings, profile_length
from moa.profile.data import TextSample, digest
from moa.profile.supervise import supervise
from moa.profile.synthetic import synthetic_samples
from moa.stages import Workspace, key_of

# What no calibration text asks; texts of several questions, so that a percentage point is more than one of them.
QUESTIONS = RecallTask(families=ONE_HOP, texts_per_family=6, questions_per_text=16)
EFFECTS_SEED = 777  # far from the calibration seeds
BASE, DEFAULT, ROUNDS, ORACLE, DUO = "joint", "answers weighted", "two rounds", "oracle", "duo"
FIXED = ("uniform", "pyramid")
AT_BUDGET = "lambda 0.05 at budget"  # the reference density is the budget's own: a profile for each budget
# What can be varied from the base, one thing at a time; the best of them became the default.
VARIANTS: Mapping[str, InfluenceSettings] = {
    "moa": InfluenceSettings("moa", weighting="text"),
    "rows": InfluenceSettings("rows", weighting="text"),
    BASE: InfluenceSettings("joint", weighting="text"),
    "margin": InfluenceSettings("joint", objective="margin", weighting="text"),
    DEFAULT: InfluenceSettings("joint"),
    "lambda 0.05": InfluenceSettings("joint", (0.05,), weighting="text"),
    AT_BUDGET: InfluenceSettings("joint", (0.05,), weighting="text"),
    "path of 3": InfluenceSettings("joint", (1.0, 0.3, 0.05), weighting="text"),
}


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is measured: texts of `n_tokens`, plans at `densities`, one profile per variant and seed.

    `num_samples` texts calibrate; `effect_texts` others show what one shortened head costs.
    """

    n_tokens: int = 1024
    densities: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_samples: int = 8
    effect_texts: int = 12
    effect_spans: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    sink_tokens: int = 8
    min_span_tokens: int = 16
    variants: tuple[str, ...] = tuple(VARIANTS)
    rounds: bool = True
    oracle: bool = True


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """One plan on one model: its recall on questions that calibrated nothing."""

    model: str
    method: str
    seed: int | None
    density_budget: float
    density: float
    questions: int
    right: int
    answer_nll: float


@dataclass(frozen=True, slots=True)
class FidelityRow:
    """One profile on one model against measured effects."""

    model: str
    method: str
    seed: int
    spearman: float
    top_quarter: float
    effects: int
    above_noise: int


@dataclass(frozen=True, eq=False)
class ModelResult:
    """All that was found on one model."""

    name: str
    dense: AccuracyRow
    accuracy: tuple[AccuracyRow, ...]
    fidelity: tuple[FidelityRow, ...]
    effects: Effects
    predicted: Mapping[str, LengthProfile]


def bench_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, settings: BenchSettings, workspace: Workspace
) -> ModelResult:
    """Measure one model; finished profiles, plans and effects in `workspace` are not measured again."""
    shape = model_shape(model, name)
    bench = _Bench(model, tokenizer, name, shape, settings, workspace, _setting(model, tokenizer, shape, settings))
    effects = bench.effects()
    profiles = {(v, seed): bench.profile(v, seed) for v in bench.fixed_reference for seed in settings.seeds}
    return ModelResult(
        name=name,
        dense=bench.accuracy(DENSE, None, 1.0, None),
        accuracy=tuple(bench.plans(profiles)),
        fidelity=tuple(bench.fidelity(effects, profiles)),
        effects=effects,
        predicted={v: profiles[v, settings.seeds[0]] for v in ("moa", BASE, DEFAULT) if v in settings.variants},
    )


def _setting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: ModelShape, settings: BenchSettings
) -> dict[str, object]:
    """What decides every unit's result beside its own inputs."""
    spans = [settings.n_tokens, settings.sink_tokens, settings.min_span_tokens]
    return {**measured_as(model, tokenizer, shape), "spans": spans}


@dataclass(frozen=True, slots=True)
class _Bench:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    shape: ModelShape
    settings: BenchSettings
    workspace: Workspace
    setting: dict[str, object]

    @property
    def fixed_reference(self) -> list[str]:
        return [v for v in self.settings.variants if v != AT_BUDGET]

    def texts(self, count: int, seed: int) -> tuple[TextSample, ...]:
        return synthetic_samples(self.tokenizer, self.settings.n_tokens, count, seed)

    def key(self, **inputs: object) -> str:
        """The key of a unit with these inputs of its own."""
        return key_of(setting=self.setting, **inputs)

    def effects(self) -> Effects:
        """Measured on texts of their own seed, those with several questions."""
        s = self.settings
        texts = [t for t in self.texts(3 * s.effect_texts, EFFECTS_SEED) if len(t.answer_positions) > 1][
            : s.effect_texts
        ]

        def make() -> object:
            found = measure_effects(
                self.model,
                self.shape,
                tuple(supervise(self.model, texts)),
                s.effect_spans,
                s.sink_tokens,
                s.min_span_tokens,
                self._progress("effects"),
            )
            return [found.mean.tolist(), found.error.tolist()]

        def read(content: object) -> Effects:
            mean, error = np.array(content, dtype=np.float64)
            return Effects(s.effect_spans, mean, error)

        key = self.key(texts=digest(texts), effect_spans=s.effect_spans)
        return self.workspace.json_unit("effects", key, make, read)

    def profile(
        self, variant: str, seed: int, density: float | None = None, reference: Plan | None = None
    ) -> LengthProfile:
        """Influence by one variant; `density` is the reference's, where it follows the budget."""
        s, influence = self.settings, VARIANTS[variant]
        if density is not None:
            influence = replace(influence, reference_density=density)
        texts, around = self.texts(s.num_samples, seed), reference.sha256 if reference else None
        key = self.key(seed=seed, texts=digest(texts), influence=asdict(influence), reference=around)

        def make() -> Profile:
            found = profile_length(
                self.model, tuple(supervise(self.model, texts)), s.n_tokens, s.sink_tokens, s.min_span_tokens, influence,
                reference=reference.span_rules if reference else None,
            )  # fmt: skip
            return Profile(self.shape, self._calibration(seed), s.sink_tokens, s.min_span_tokens, (found,))

        return self.workspace.unit("profile", key, ".safetensors", make, Profile.save, Profile.load).lengths[0]

    def _calibration(self, seed: int) -> Calibration:
        s = self.settings
        return Calibration(
            dataset="synthetic", dataset_sha256="0" * 64, samples_per_length=s.num_samples,
            lengths_tokens=(s.n_tokens,), seed=seed, estimator="joint", supervision="model",
        )  # fmt: skip

    def plans(self, profiles: Mapping[tuple[str, int], LengthProfile]) -> Iterator[AccuracyRow]:
        """Every method at every density."""
        s = self.settings
        for density in s.densities:
            for baseline in FIXED:
                yield self.accuracy(baseline, None, density, self._baseline(baseline, density))
            for (variant, seed), profile in profiles.items():
                yield self.accuracy(variant, seed, density, self.best_plan(profile, density))
            for seed in s.seeds:
                yield from self._seeded(density, seed, profiles[BASE, seed])
        if s.oracle:
            yield from self._oracle()

    def _seeded(self, density: float, seed: int, profile: LengthProfile) -> Iterator[AccuracyRow]:
        """Methods that need the default profile, or one of their own for each budget."""
        s = self.settings
        yield self.accuracy(DUO, seed, density, self._baseline(DUO, density, profile, seed))
        for variant in s.variants:
            if variant not in self.fixed_reference:
                plan = self.best_plan(self.profile(variant, seed, density), density)
                yield self.accuracy(variant, seed, density, plan)
        if s.rounds:
            second = self.profile("lambda 0.05", seed, reference=self.best_plan(profile, density))
            yield self.accuracy(ROUNDS, seed, density, self.best_plan(second, density))

    def _baseline(self, name: str, density: float, profile: LengthProfile | None = None, seed: int = 0) -> Plan:
        s = self.settings
        whole = None
        if profile is not None:
            whole = Profile(self.shape, self._calibration(seed), s.sink_tokens, s.min_span_tokens, (profile,))
        return baseline_plan(
            name, self.shape, density, (s.n_tokens,), sink_tokens=s.sink_tokens, min_span_tokens=s.min_span_tokens,
            profile=whole,
        )  # fmt: skip

    def best_plan(self, profile: LengthProfile, density: float) -> Plan:
        """The plan of least predicted loss at the profile's length."""
        s = self.settings
        rules = rule_grid((s.n_tokens,), s.sink_tokens, s.min_span_tokens)
        problem = AssignmentProblem(
            loss=np.stack([profile.rule_loss(rule, s.min_span_tokens, "running") for rule in rules], axis=-1)[None],
            spans=span_table(rules, (s.n_tokens,), s.min_span_tokens),
            budget_lengths=(s.n_tokens,),
            density_budget=(density,),
            max_rules_per_layer=4,
            loss_lengths=(s.n_tokens,),
        )
        chosen = solve(problem, always_milp=False).rules.tolist()
        return Plan(
            model=self.shape,
            sink_tokens=s.sink_tokens,
            min_span_tokens=s.min_span_tokens,
            rules=tuple(tuple((rules[r].alpha, rules[r].beta) for r in layer) for layer in chosen),
        )

    def _oracle(self) -> Iterator[AccuracyRow]:
        s = self.settings
        texts = self.texts(s.num_samples, s.seeds[0])
        key = self.key(texts=digest(texts), densities=s.densities)

        def make() -> object:
            found = oracle_plans(
                self.model, self.shape, tuple(supervise(self.model, texts)), s.n_tokens, s.densities, s.sink_tokens, s.min_span_tokens,
                lambda density: self.workspace.progress(f"{self.name}: oracle", s.densities.index(density) + 1, len(s.densities)),
            )  # fmt: skip
            return [[density, plan.to_json()] for density, plan in found.items()]

        def read(content: Any) -> list[tuple[float, Plan]]:
            return [(density, Plan.from_json(text, "oracle")) for density, text in content]

        for density, plan in self.workspace.json_unit("oracle", key, make, read):
            yield self.accuracy(ORACLE, s.seeds[0], density, plan)

    def fidelity(self, effects: Effects, profiles: Mapping[tuple[str, int], LengthProfile]) -> Iterator[FidelityRow]:
        for (variant, seed), profile in profiles.items():
            found = fidelity(effects, profile, self.settings.min_span_tokens)
            yield FidelityRow(self.name, variant, seed, **asdict(found))

    def accuracy(self, method: str, seed: int | None, density: float, plan: Plan | None) -> AccuracyRow:
        """Recall under a plan; a unit, so that equal plans of several methods are measured once."""
        s, task = self.settings, QUESTIONS

        def make() -> object:
            with apply(self.model, plan) if plan else nullcontext():
                score = recall(self.model, self.tokenizer, (s.n_tokens,), task)[0].overall
            return [score.questions, score.right, score.answer_nll]

        def read(content: Any) -> tuple[int, int, float]:
            questions, right, nll = content
            return int(questions), int(right), float(nll)

        rules = plan.rules if plan else None
        key = self.key(rules=rules, length_mode=plan.length_mode if plan else None, task=task.model_dump())
        questions, right, nll = self.workspace.json_unit("recall", key, make, read)
        kept = plan.span_rules.density_ratio(s.n_tokens) if plan else 1.0
        self.workspace.progress(f"{self.name}: {method} at {density:g}", 1, 1)
        return AccuracyRow(self.name, method, seed, density, kept, questions, right, nll)

    def _progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.workspace.progress(f"{self.name}: {stage}", done, total)
