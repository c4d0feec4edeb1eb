"""`moa demo`: the main job on the model that ships, from dense evaluation to report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa.cli.output import emit, emit_json
from moa.cli.session import save_options, session


def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder for report, plans and pictures.")
    ] = Path("moa-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the calibration texts.")] = 0,
    num_samples: Annotated[int, typer.Option(min=2, help="Calibration texts per length.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write the report as JSON.")] = False,
) -> None:
    """Compress the small model that ships with moa and show what it cost, beside two baselines (five minutes)."""
    from rich.console import Console

    from moa.demo.job import DemoSettings, run_demo
    from moa.eval.report import terminal_table

    options = {"seed": seed, "num_samples": num_samples}
    with session(output_dir, options, resume=resume, overwrite=overwrite) as workspace:
        save_options(output_dir, options)
        report = run_demo(output_dir, DemoSettings(num_samples=num_samples, seed=seed), workspace.progress)
    if json:
        emit_json(report.model_dump(mode="json"))
        return
    Console().print(terminal_table(report))
    emit(f"Report and pictures: {output_dir / 'report.md'}")
