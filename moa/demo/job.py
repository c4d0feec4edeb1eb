"""The main job on the model that ships: dense evaluation, compress at three budgets, evaluation beside two baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.demo import MODEL_FOLDER
from moa.demo.language import ONE_HOP
from moa.eval.conditions import conditions
from moa.eval.evaluate import evaluate, pareto_points
from moa.eval.records import MethodResult, ParetoPoint, RecallTask, Report
from moa.eval.report import write_report
from moa.eval.speed import measure_speed
from moa.hf.load import load_model, load_tokenizer
from moa.hf.shape import model_shape
from moa.optimize.baselines import uniform_rule
from moa.pipeline import Compressed, compress
from moa.plan import Plan
from moa.profile.artefact import Profile
from moa.profile.sweep import Estimator
from moa.settings import CompressSettings
from moa.stages import Progress, Workspace, silent

DENSITIES = (0.5, 0.25, 0.125)
MAIN_DENSITY = 0.25
PROFILE_LENGTHS = (512, 1024, 2048)
VALIDATE_LENGTH = 4096
EVAL_LENGTHS = (1024, 2048, 4096)
DENSE_LENGTHS = (512, *EVAL_LENGTHS)
# The same sinks and least span for every method and budget, so that plans differ in their rules alone. At 512 tokens
# and 12.5 % a head has 64 tokens on average: the least span must leave room to give some heads more.
SINK_TOKENS, MIN_SPAN_TOKENS = 8, 16


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Sizes of the demo; the defaults take about five minutes on two cores."""

    densities: tuple[float, ...] = DENSITIES
    num_samples: int = 8
    max_candidates: int = 3
    task: RecallTask = field(default_factory=lambda: RecallTask(families=ONE_HOP))
    speed_rounds: int = 3
    seed: int = 0

    def compress_settings(self, density: float, estimator: Estimator) -> CompressSettings:
        """What `moa compress` is asked for at one budget."""
        return CompressSettings(
            density=density,
            lengths_tokens=PROFILE_LENGTHS,
            validate_length_tokens=VALIDATE_LENGTH,
            num_samples=self.num_samples,
            seed=self.seed,
            estimator=estimator,
            sink_tokens=SINK_TOKENS,
            min_span_tokens=MIN_SPAN_TOKENS,
            max_candidates=self.max_candidates,
            front_levels=0,
        )


def run_demo(folder: Path, settings: DemoSettings | None = None, progress: Progress = silent) -> Report:
    """Run the main job on the shipped model and write report and pictures into `folder`.

    Raises:
        MoaError: see `moa.errors`.
    """
    settings = settings or DemoSettings()
    model, tokenizer = load_model(str(MODEL_FOLDER)), load_tokenizer(str(MODEL_FOLDER))
    work = Workspace(folder, progress)
    results = [evaluate(model, tokenizer, None, DENSE_LENGTHS, task=settings.task)]
    total = 3 * len(settings.densities) + 1
    progress("evaluate", 1, total)
    main: Compressed | None = None
    for method, density, made in _plans(model, tokenizer, settings, work):
        plan = made.plan if isinstance(made, Compressed) else made
        results.append(
            evaluate(
                model, tokenizer, plan, EVAL_LENGTHS, method=method, density_budget_ratio=density, task=settings.task
            )
        )
        progress("evaluate", len(results), total)
        if method == "joint" and density == MAIN_DENSITY and isinstance(made, Compressed):
            main = made
    return _report(model, results, main, settings, folder)


def _plans(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: DemoSettings, work: Workspace
) -> Iterator[tuple[str, float, Compressed | Plan]]:
    """Every method's plan at every budget: the uniform span, MoA's published estimator, and ours."""
    shape = model_shape(model, "demo")
    for density in settings.densities:
        rule = uniform_rule(DENSE_LENGTHS, (density,) * len(DENSE_LENGTHS), MIN_SPAN_TOKENS)
        yield (
            "uniform",
            density,
            Plan.uniform(shape, rule.alpha, rule.beta, sink_tokens=SINK_TOKENS, min_span_tokens=MIN_SPAN_TOKENS),
        )
    for estimator, method in (("moa", "moa-estimator"), ("joint", "joint")):
        for density in settings.densities:
            wanted = settings.compress_settings(density, estimator)  # type: ignore[arg-type]  # the two literals above
            place = replace(work, folder=work.folder / f"{method}-{100 * density:g}", units=work.folder / "stages")
            yield method, density, compress(model, tokenizer, wanted, place, "demo")


def _report(
    model: PreTrainedModel,
    results: Sequence[MethodResult],
    main: Compressed | None,
    settings: DemoSettings,
    folder: Path,
) -> Report:
    speed = (
        [measure_speed(model, main.plan, length_tokens=n, rounds=settings.speed_rounds) for n in EVAL_LENGTHS[-2:]]
        if main
        else []
    )
    points: tuple[ParetoPoint, ...] = ()
    if main:
        profile = Profile.load(folder / f"joint-{100 * MAIN_DENSITY:g}" / "profile.safetensors")
        points = pareto_points(profile, main.candidates, main.plan, main.true_losses)
        main.plan.save(folder / "plan.json")
    report = Report(
        title="moa demo",
        conditions=conditions(model, DENSE_LENGTHS, name="demo", task=settings.task),
        dense=results[0],
        methods=tuple(results[1:]),
        speed=tuple(speed),
        pareto=points,
    )
    write_report(report, folder, plan=main.plan if main else None)
    return report
