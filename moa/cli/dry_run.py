"""`moa compress --dry-run`: predicted beside measured, and what the whole run would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moa.cli.output import emit, emit_json, emit_table, note
from moa.cli.progress import showing, telling
from moa.units import human_bytes

if TYPE_CHECKING:
    from moa.dry_run import DryRun
    from moa.settings import CompressSettings

UNKNOWN = "–"


def show_dry_run(settings: CompressSettings, options: Mapping[str, Any], json: bool) -> None:
    """Run one text and write what came of it."""
    from moa import demo
    from moa.dry_run import dry_run

    with showing() as progress, telling():
        path, dtype = demo.resolve(str(options["model"])), str(options["dtype"])
        found = dry_run(path, settings, dtype=dtype, device_map=options["device_map"], progress=progress)
    if json:
        emit_json(found.as_dict())
    else:
        _show(found)
    free = found.estimate.available_bytes
    if found.peak_bytes > free:
        note(f"moa: warning: the peak was {human_bytes(found.peak_bytes)} and {human_bytes(free)} were free before")


def _show(found: DryRun) -> None:
    model, longest = found.estimate, found.steps[0].length_tokens
    emit(f"A text of {longest} tokens, as the model will see it:\n{found.text}\n")
    emit(
        f"{model.architecture}, {model.parameters / 1e6:.1f} M parameters, {model.dtype} weights "
        f"{human_bytes(model.weight_bytes)}\n"
    )
    rows = [
        (
            step.name,
            f"{step.length_tokens:,}",
            *(UNKNOWN if s is None else f"{s:.3g} s" for s in (step.predicted_s, step.measured_s)),
            *(UNKNOWN if b is None else human_bytes(b) for b in (step.predicted_bytes, step.measured_bytes)),
            _duration(step.whole_s),
        )
        for step in found.steps
    ]
    headings = ("one text", "tokens", "predicted", "measured", "peak predicted", "measured", "whole run")
    emit_table(headings, rows)
    emit(
        f"\nIn all about {_duration(found.whole_s)} on this machine and the solver's time; peak memory about "
        f"{human_bytes(found.peak_bytes)}, weights included."
    )


def _duration(seconds: float) -> str:
    """`3.2 s`, `12 min`, `4.5 h`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
