"""What `moa bench influence` writes: two CSV files, pictures, and a page of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student
from transformers import PreTrainedModel

from moa.eval.bench_influence import BASE, DEFAULT, QUESTIONS, AccuracyRow, BenchSettings, FidelityRow, ModelResult
from moa.eval.conditions import environment
from moa.eval.csv_rows import csv_rows
from moa.eval.figures import COLOURS, DENSE_COLOUR, MARKERS, png
from moa.eval.markdown import table
from moa.files import write_atomic
from moa.local_paths import typed_command
from moa.spans import ElasticRule

SHOWN_IN_PICTURE = (BASE, DEFAULT, "moa", "oracle", "duo", "pyramid", "uniform")


def write_report(results: Sequence[ModelResult], folder: Path, conditions: Sequence[str]) -> None:
    """Write accuracy.csv, fidelity.csv, their pictures and README.md, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for result in results for row in (result.dense, *result.accuracy)]
    write_atomic(folder / "accuracy.csv", csv_rows(rows, AccuracyRow))
    write_atomic(folder / "fidelity.csv", csv_rows([row for r in results for row in r.fidelity], FidelityRow))
    write_atomic(folder / "accuracy.png", accuracy_picture(results))
    write_atomic(folder / "fidelity.png", fidelity_picture(results))
    write_atomic(folder / "README.md", page(results, conditions).encode())


def conditions_of(model: PreTrainedModel, settings: BenchSettings) -> tuple[str, ...]:
    """Lines that say how the figures were taken."""
    e = environment(model)
    seeds, texts = ", ".join(map(str, settings.seeds)), QUESTIONS.single_texts + 2 * QUESTIONS.texts_per_family
    spans = f"sinks {settings.sink_tokens}, least span {settings.min_span_tokens} tokens"
    return (
        f"texts of {settings.n_tokens:,} tokens; {settings.num_samples} calibrate per seed, seeds {seeds}; {spans}",
        f"{texts} other texts, up to {QUESTIONS.questions_per_text} questions each, measure accuracy",
        f"{settings.effect_texts} texts of a third kind measure effects",
        f"{e.device}, {e.dtype}, {e.threads} threads; moa {e.moa}, torch {e.torch}, transformers {e.transformers}",
        f"{datetime.now(UTC):%Y-%m-%d}, `{typed_command()}`",
    )


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval; 0 wide where there is one value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, 0.0
    return mean, float(student.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))


def accuracies(result: ModelResult, method: str, density: float) -> list[float]:
    """Accuracy in per cent, in the order of seeds."""
    found = [r for r in result.accuracy if r.method == method and r.density_budget == density]
    return [100 * r.right / r.questions for r in found]


def page(results: Sequence[ModelResult], conditions: Sequence[str]) -> str:
    """The page: conditions, a table of accuracy per model, and a table of fidelity."""
    parts = ["# Influence: estimators, baselines and an oracle", "\n".join(f"- {line}" for line in conditions)]
    for result in results:
        parts += [f"## Recall on {result.name}", _accuracy_table(result)]
    parts += ["![accuracy](accuracy.png)", "## Fidelity", FIDELITY_TEXT, _fidelity_table(results)]
    return "\n\n".join([*parts, "![fidelity](fidelity.png)"]) + "\n"


FIDELITY_TEXT = (
    "Predicted against measured change of the loss when one KV head alone gets one span. The noise floor of an effect is "
    "two standard errors of its mean over the texts, each text read by the dense and the shortened model; rank "
    "correlation and the share of the largest quarter are over the effects above it. Mean over calibration seeds, with "
    "95 % t-intervals."
)


def _accuracy_table(result: ModelResult) -> str:
    densities = sorted({r.density_budget for r in result.accuracy}, reverse=True)
    methods = list(dict.fromkeys(r.method for r in result.accuracy))
    dense = 100 * result.dense.right / result.dense.questions
    rows = [["dense", *([f"{dense:.1f}"] * len(densities))]]
    rows += [[m, *(_cell(accuracies(result, m, d)) for d in densities)] for m in methods]
    return table(["right answers, %", *(f"{100 * d:g} % density" for d in densities)], rows)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, half = mean_and_half(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def _fidelity_table(results: Sequence[ModelResult]) -> str:
    methods = list(dict.fromkeys(row.method for result in results for row in result.fidelity))
    rows = []
    for method in methods:
        cells = []
        for result in results:
            found = [row for row in result.fidelity if row.method == method]
            spearman, half = mean_and_half([row.spearman for row in found])
            top, _ = mean_and_half([row.top_quarter for row in found])
            cells += ["–", "–"] if math.isnan(spearman) else [f"{spearman:.3f} ± {half:.3f}", f"{top:.2f}"]
        rows.append([method, *cells])
    headings = [h for result in results for h in (f"{result.name}: Spearman", "largest quarter")]
    return table(["estimator", *headings], rows)


def accuracy_picture(results: Sequence[ModelResult]) -> bytes:
    """PNG of recall against density, one panel per model; bars are 95 % t-intervals over calibration seeds."""
    figure = Figure(figsize=(4.2 * len(results), 4.0), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        densities = sorted({r.density_budget for r in result.accuracy})
        shown = [m for m in SHOWN_IN_PICTURE if any(r.method == m for r in result.accuracy)]
        for i, method in enumerate(shown):
            points = [mean_and_half(accuracies(result, method, d)) for d in densities]
            at = np.array(densities) * 2 ** (0.04 * (i - len(shown) / 2))
            axes.errorbar(
                at, [m for m, _ in points], yerr=[h for _, h in points], label=method, capsize=3,
                color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
            )  # fmt: skip
        axes.axhline(100 * result.dense.right / result.dense.questions, color=DENSE_COLOUR, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(densities, [f"{100 * d:g} %" for d in densities])
        axes.set(title=result.name, xlabel="density", ylim=(-3, 105))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right answers, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(shown), 3 * len(results)),
        frameon=False,
    )
    return png(figure)


def fidelity_picture(results: Sequence[ModelResult]) -> bytes:
    """PNG of predicted against measured effects above the noise, one panel per model."""
    figure = Figure(figsize=(4.2 * len(results), 4.0), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        effects = result.effects
        for i, (method, profile) in enumerate(sorted(result.predicted.items(), reverse=True)):
            rules = [ElasticRule(span, 0.0) for span in effects.spans_tokens]
            least = effects.spans_tokens[0]
            predicted = np.stack([profile.rule_loss(rule, least, "running") for rule in rules], axis=-1)
            chosen = effects.above_noise & (predicted > 0)
            axes.loglog(
                np.abs(effects.mean[chosen]), predicted[chosen], MARKERS[i], color=COLOURS[i], alpha=0.6, label=method,
                markersize=4.5,
            )  # fmt: skip
        axes.set(title=result.name, xlabel="change of the loss, nats per answer token")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("predicted")
    panels[0].legend(frameon=False)
    return png(figure)
