"""`moa bench`: measurements behind the project's figures, which others can repeat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa.cli.output import emit
from moa.cli.progress import logging_to, showing

if TYPE_CHECKING:
    from moa.stages import Progress

app = typer.Typer(
    help="Repeat the measurements behind the project's figures.", no_args_is_help=True, rich_markup_mode=None
)

PAGE = "README.md"
OutputDir = Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for CSV files, pictures and a page.")]


@app.command()
def influence(
    models: Annotated[list[str], typer.Argument(help="Small models; 'demo' is the one that ships with moa.")],
    output_dir: OutputDir,
    length: Annotated[int, typer.Option(min=256, help="Length of the texts, in tokens.")] = 1024,
    seeds: Annotated[int, typer.Option(min=1, help="Calibration seeds.")] = 5,
    num_samples: Annotated[int, typer.Option(min=2, help="Calibration texts per seed.")] = 8,
    oracle: Annotated[bool, typer.Option(help="Also search by measured loss, which is slow.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Compare influence estimators, baselines and an oracle: what they predict, and the plans that come of it."""
    from moa import demo
    from moa.errors import UsageError
    from moa.eval.bench_influence import BenchSettings, bench_model
    from moa.eval.influence_report import conditions_of, write_report
    from moa.hf.load import load_model, load_tokenizer
    from moa.stages import Workspace

    settings = BenchSettings(n_tokens=length, seeds=tuple(range(seeds)), num_samples=num_samples, oracle=oracle)
    if len({Path(name).name for name in models}) < len(models):
        raise UsageError(
            f"the tables call models by the last part of their names, and two of {models} have the same one"
        )
    results = []
    with showing() as progress:
        workspace = Workspace.open(output_dir, resume=resume, overwrite=overwrite, progress=progress)
        with logging_to(output_dir / "moa.log"):
            for name in models:
                path = demo.resolve(name)
                model = load_model(path, "auto", None)
                results.append(bench_model(model, load_tokenizer(path), Path(name).name, settings, workspace))
            write_report(results, output_dir, conditions_of(model, settings))
    _emit_page(output_dir)


@app.command()
def profile(
    output_dir: OutputDir,
    lengths: Annotated[
        str, typer.Option(help="Lengths, in tokens, separated by commas.")
    ] = "2048,4096,8192,16384,32768",
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each kind, up to 8,192 tokens.")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Measure what profiling costs beside a plain training step: peak memory and time at growing lengths."""
    from moa.eval.bench_profile import bench_costs
    from moa.eval.cost_report import write_report

    wanted = _lengths(lengths)
    with page_in(output_dir, overwrite) as progress:
        write_report(bench_costs(wanted, repeats, progress), output_dir, repeats)


@app.command()
def optimize(
    output_dir: OutputDir,
    max_rules_per_layer: Annotated[int, typer.Option(min=1, help="Distinct rules in one layer.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the made-up losses.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Time the optimizer on problems of large models' size, and say how far from optimal its plans can be."""
    from moa.eval.bench_optimize import OptimizeBench, bench_optimize, write_bench

    settings = OptimizeBench(max_rules_per_layer=max_rules_per_layer, seed=seed)
    with page_in(output_dir, overwrite) as progress:
        write_bench(bench_optimize(settings, progress), settings, output_dir)


@app.command()
def kernels(
    output_dir: OutputDir,
    device: Annotated[str, typer.Option(help="Where to measure: cuda or cpu.")] = "cuda",
    budget_minutes: Annotated[
        float | None,
        typer.Option(min=1, help="Begin nothing that would not be done by then; most telling cases first."),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: measure a plan.json as well, or MoA's alphas and betas for the shape NAME."),
    ] = None,
    length: Annotated[int, typer.Option(min=1024, help="On a CPU: longest text, in tokens.")] = 16384,
    turns: Annotated[int, typer.Option(min=1, help="On a CPU: turns of a prefill; decodes take 12 times as many.")] = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Measure the attention kernels beside their peers, and hold them against their targets."""
    from moa.errors import UsageError

    if device == "cpu":
        return _kernels_on_cpu(output_dir, length, turns, overwrite)
    if device != "cuda":
        raise UsageError(f"--device must be cuda or cpu, got {device!r}")
    from moa.eval.gpu.report import summary
    from moa.eval.gpu.run import Settings, bench_gpu
    from moa.local_paths import typed_command

    settings = Settings(output_dir, budget_minutes, _plan_files(plan or []), typed_command())
    emit(summary(bench_gpu(settings, resume=resume, overwrite=overwrite)))
    _emit_page(output_dir)


def _kernels_on_cpu(output_dir: Path, length: int, turns: int, overwrite: bool) -> None:
    from moa.errors import UsageError
    from moa.eval.cpu.bench import bench_cpu
    from moa.eval.cpu.report import write_report

    if length % 1024:
        raise UsageError(f"--length must be a multiple of 1,024 tokens, got {length}")
    with page_in(output_dir, overwrite) as progress:
        write_report(*bench_cpu(length, turns, progress), output_dir)


@app.command()
def context(
    output_dir: OutputDir,
    model: Annotated[str, typer.Argument(help="A small model; 'demo' is the one that ships with moa.")] = "demo",
    seeds: Annotated[int, typer.Option(min=1, help="Calibration seeds.")] = 3,
    num_samples: Annotated[int, typer.Option(min=2, help="Calibration texts per length and seed.")] = 16,
    questions: Annotated[int, typer.Option(min=2, help="Questions per plan and length.")] = 240,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Measure how long texts may get at equal average spans, what each freedom of a plan is worth, and unseen lengths."""
    from moa import demo
    from moa.eval.bench_context import ContextBench, bench_context
    from moa.eval.context_report import conditions_of, write_report
    from moa.hf.load import load_model, load_tokenizer
    from moa.local_paths import public_name
    from moa.stages import Workspace

    settings = ContextBench(seeds=tuple(range(seeds)), num_samples=num_samples, questions=questions)
    path, name = demo.resolve(model), public_name(model)
    with showing() as progress:
        workspace = Workspace.open(output_dir, resume=resume, overwrite=overwrite, progress=progress)
        with workspace, logging_to(output_dir / "moa.log"):
            loaded = load_model(path, "auto", None)
            rows = bench_context(loaded, load_tokenizer(path), name, settings, workspace)
            write_report(rows, settings, output_dir, conditions_of(loaded, name, settings))
    _emit_page(output_dir)


@app.command(name="apply")
def apply_(
    output_dir: OutputDir,
    lengths: Annotated[
        str, typer.Option(help="Lengths, in tokens, separated by commas; above 4,096 for one of the models.")
    ] = "256,1024,4096,16384",
    turns: Annotated[int, typer.Option(min=1, help="Turns of a prefill; decodes take 12 times as many.")] = 5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Measure models with a plan applied beside stock transformers on a CPU: prefill, decode, KV bytes, break-even."""
    from moa.eval.apply_report import write_report
    from moa.eval.bench_apply import bench_apply

    wanted = _lengths(lengths)
    with page_in(output_dir, overwrite) as progress:
        write_report(bench_apply(wanted, turns, progress), output_dir)


@contextmanager
def page_in(folder: Path, overwrite: bool) -> Iterator[Progress]:
    """Measure and write a page into a folder, which may be a project's own: a page that is there is refused beforehand."""
    from moa.cli.output import require_free

    require_free(folder / PAGE, overwrite)
    with showing() as progress:
        yield progress
    _emit_page(folder)


def _emit_page(folder: Path) -> None:
    emit(f"Results: {folder / PAGE}")


def _lengths(text: str) -> list[int]:
    from moa.errors import UsageError

    try:
        wanted = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--lengths must be whole numbers separated by commas, got {text!r}") from None
    if min(wanted) < 256:
        raise UsageError(f"--lengths must be at least 256 tokens, got {min(wanted)}")
    return sorted(wanted)


def _plan_files(given: list[str]) -> tuple[tuple[str, Path], ...]:
    from moa.errors import UsageError

    parts = [text.partition("=") for text in given]
    for text, (name, _, file) in zip(given, parts, strict=True):
        if not name or not file:
            raise UsageError(f"--plan takes NAME=FILE, got {text!r}")
    return tuple((name, Path(file)) for name, _, file in parts)
