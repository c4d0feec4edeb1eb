"""`moa compress`: a model in, a plan out. `moa estimate`: what that would take, without running the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moa.cli.budget import BUDGETS, DecodeMs, Density, Device, KvBytesPerToken, KvGib, budget_fields, with_budget
from moa.cli.dry_run import show_dry_run
from moa.cli.output import emit, emit_json, emit_table, note
from moa.cli.session import helping, save_options, session
from moa.units import human_bytes

if TYPE_CHECKING:
    from moa.estimate import Estimate
    from moa.pipeline import Compressed
    from moa.settings import CompressSettings
    from moa.stages import Workspace

ModelName = Annotated[str, typer.Argument(help="Model folder or hub id; 'demo' is the model that ships with moa.")]
Lengths = Annotated[str, typer.Option(help="Lengths to profile, in tokens, separated by commas.")]
ValidateLength = Annotated[
    int | None, typer.Option(help="Longer length at which the plan is chosen. Default: twice the longest.")
]
NumSamples = Annotated[int, typer.Option(help="Calibration texts per length.")]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory, a third more time. Default: where memory would be short.",
    ),
]


def compress(
    context: typer.Context,
    model: ModelName = "demo",
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the plan and all else.")] = Path(
        "out"
    ),
    density: Density = None,
    kv_bytes_per_token: KvBytesPerToken = None,
    kv_gib: KvGib = None,
    decode_ms: DecodeMs = None,
    device: Device = None,
    lengths: Lengths = "",
    validate_length: ValidateLength = None,
    dataset: Annotated[
        str, typer.Option(help="JSON-lines or Parquet file, data set folder, hub id (id:config/split), or 'synthetic'.")
    ] = "synthetic",
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of a hub's or folder's data set.")] = None,
    dataset_split: Annotated[str | None, typer.Option(help="Its split. Default: train, or the only one.")] = None,
    columns: Annotated[
        str, typer.Option(help="Its columns, as in prompt=input,answer=output; also context, messages, text.")
    ] = "",
    chat_template: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Write texts by the tokenizer's chat template, if it has one.")
    ] = "auto",
    num_samples: NumSamples = 16,
    seed: Annotated[int, typer.Option(help="Seed of the calibration texts.")] = 0,
    estimator: Annotated[
        Literal["joint", "rows", "moa"], typer.Option(help="'rows' adds up sizes per row, 'moa' is the published one.")
    ] = "joint",
    rounds: Annotated[int, typer.Option(min=1, help="Profile again at the plan just found, so many times in all.")] = 1,
    supervision: Annotated[Literal["model", "reference"], typer.Option(help="Whose answers count.")] = "model",
    mixed_lengths: Annotated[
        bool, typer.Option("--mixed-lengths", help="Synthetic texts of half of each length to all of it.")
    ] = False,
    max_answer_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer by the model, or at a plain text's end.")
    ] = 32,
    rules: Annotated[
        Path | None,
        typer.Option(
            help="JSON or YAML list of candidate rules [alpha, beta]. Default: dense, windows from the least span (64 "
            "tokens for a density of 1/4 or more), shares of the length from 1/32, and MoA's grid."
        ),
    ] = None,
    max_rules_per_layer: Annotated[int, typer.Option(min=1, help="Distinct rules in one layer.")] = 4,
    elastic: Annotated[
        bool, typer.Option("--elastic/--no-elastic", help="Whether spans may grow with the length (beta above 0).")
    ] = True,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="One rule for all KV heads of a layer.")] = False,
    sink_tokens: Annotated[int | None, typer.Option(min=0, help="First tokens that every head keeps.")] = None,
    min_span_tokens: Annotated[int | None, typer.Option(min=1, help="Least span, sinks included.")] = None,
    gradient_checkpointing: GradientCheckpointing = None,
    front: Annotated[
        bool, typer.Option("--front", help="Also write the best plan at a range of densities, a table and a picture.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Weights' dtype; 'auto' is the checkpoint's.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, such as 'auto'.")] = None,
    peer_timeout_s: Annotated[
        int, typer.Option("--peer-timeout-s", min=1, help="Under torchrun: longest wait for another process.")
    ] = 1800,
    config: Annotated[Path | None, typer.Option(help="YAML file of these options; the command line wins.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run one text at the longest length, say what the whole run takes.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON object.")] = False,
) -> None:
    """Find the plan that loses least within a KV budget: profile, optimize, validate."""
    options = {
        "model": model, "density": density, "kv_bytes_per_token": kv_bytes_per_token, "kv_gib": kv_gib,
        "decode_ms": decode_ms, "device": device, "lengths": lengths, "validate_length": validate_length,
        "dataset": dataset, "num_samples": num_samples, "seed": seed, "estimator": estimator, "rounds": rounds, "supervision": supervision,
        "dataset_config": dataset_config, "dataset_split": dataset_split, "columns": columns,
        "chat_template": chat_template, "max_answer_tokens": max_answer_tokens,
        "rules": None if rules is None else str(rules),
        "mixed_lengths": mixed_lengths,
        "front": front,
        "max_rules_per_layer": max_rules_per_layer, "elastic": elastic, "per_layer": per_layer, "sink_tokens": sink_tokens, "min_span_tokens": min_span_tokens,
        "gradient_checkpointing": gradient_checkpointing, "dtype": dtype, "device_map": device_map,
        "peer_timeout_s": peer_timeout_s,
    }  # fmt: skip
    resolved = with_budget(_with_config(options, config, context))
    settings = _settings(resolved)
    if dry_run:
        _refuse_team()
        show_dry_run(settings, resolved, json)
        return
    result = _run(settings, resolved, output_dir, resume=resume, overwrite=overwrite)
    if result is not None:
        _show_result(result, output_dir, json)


def estimate(
    model: ModelName = "demo",
    density: Density = None,
    kv_bytes_per_token: KvBytesPerToken = None,
    kv_gib: KvGib = None,
    decode_ms: DecodeMs = None,
    device: Device = None,
    lengths: Lengths = "",
    validate_length: ValidateLength = None,
    num_samples: NumSamples = 16,
    gradient_checkpointing: GradientCheckpointing = None,
    json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> None:
    """Say what `moa compress` would take in time and memory and what its plan would save; runs no model."""
    options = {
        "model": model, "density": density, "kv_bytes_per_token": kv_bytes_per_token, "kv_gib": kv_gib,
        "decode_ms": decode_ms, "device": device, "lengths": lengths, "validate_length": validate_length,
        "num_samples": num_samples, "gradient_checkpointing": gradient_checkpointing,
    }  # fmt: skip
    _show_estimate(_estimate(model, _settings(with_budget(options))), json)


def _with_config(options: dict[str, Any], config: Path | None, context: typer.Context) -> dict[str, Any]:
    """The options, with those that were not typed taken from a YAML file."""
    if config is None:
        return options
    import yaml

    from moa.errors import InputError, closest

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise InputError(f"{config}: no such file; --config takes a YAML file of options") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or no such date
        raise InputError(f"{config}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{config}: wanted 'option: value' lines, got {type(content).__name__}")
    typed = {name for name in options if _is_typed(context, name)}
    # Budgets exclude each other: one on the command line replaces whichever the file has.
    replaced = {*BUDGETS, "device"} if typed & {*BUDGETS} else set()
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in options:
            raise InputError(f"{config}: unknown option {name!r}{closest(key, options)}")
        _check_type(config, key, value, options[key])
        if key not in typed | replaced:
            options[key] = ",".join(map(str, value)) if key == "lengths" and isinstance(value, list) else value
    return options


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is None or source.name != "DEFAULT"


# Options that are no settings of `moa.compress`, or not under these names.
RUN_OPTIONS = (
    *BUDGETS, "model", "device", "rules", "front", "lengths", "validate_length", "dtype", "device_map", "peer_timeout_s",
)  # fmt: skip
# Options without a default, and the types they may have in a --config file.
OPTIONAL = {
    "validate_length": (int,), "sink_tokens": (int,), "min_span_tokens": (int,), "device_map": (str,),
    "dataset_config": (str,), "dataset_split": (str,), "density": (float, int), "kv_bytes_per_token": (float, int),
    "kv_gib": (str,), "decode_ms": (str,), "device": (str,), "rules": (str,), "gradient_checkpointing": (bool,),
}  # fmt: skip


def _check_type(config: Path, name: str, value: object, default: object) -> None:
    from moa.errors import InputError

    if name in OPTIONAL and value is None:
        return
    known = {**OPTIONAL, "lengths": (list, str, int)}
    wanted = known.get(name, (type(default),))
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise InputError(f"{config}: {name} must be of type {wanted[0].__name__}, got {value!r}")


def _settings(options: Mapping[str, Any]) -> CompressSettings:
    """The options as settings; lengths that were not given follow from the model's context."""
    from moa import demo
    from moa.errors import UsageError
    from moa.hf.load import context_tokens, load_config
    from moa.optimize.budget import budget_text
    from moa.optimize.rules_file import read_rules
    from moa.settings import CompressSettings, default_lengths

    fields = {k: v for k, v in options.items() if k not in RUN_OPTIONS} | budget_fields(options)
    if options.get("rules"):
        fields["rules"] = read_rules(Path(options["rules"]))
    if options["lengths"]:
        try:
            fields["lengths_tokens"] = tuple(int(part) for part in str(options["lengths"]).split(","))
        except ValueError:
            raise UsageError(
                f"--lengths must be whole numbers separated by commas, got {options['lengths']!r}"
            ) from None
    else:
        fields["lengths_tokens"] = default_lengths(context_tokens(load_config(demo.resolve(options["model"]))))
    settings = CompressSettings(validate_length_tokens=options["validate_length"], **fields)
    if settings.budget:
        note(f"moa: {budget_text(settings.budget)}")
    return settings


def _run(
    settings: CompressSettings, options: Mapping[str, Any], folder: Path, *, resume: bool, overwrite: bool
) -> Compressed | None:
    """The result; None for a process that only helps another one."""
    from moa import demo
    from moa.distributed import joined, own_device
    from moa.hf.load import load_model, load_tokenizer
    from moa.local_paths import public_name
    from moa.pipeline import check_lengths, compress

    name = str(options["model"])
    path = demo.resolve(name)
    device_map = own_device(options["device_map"])
    with joined(options["peer_timeout_s"]) as team:
        place = session(folder, options, resume=resume, overwrite=overwrite) if team.leads else helping(folder)
        with place as workspace:
            team.wait()  # until the leader has made the folder
            model = load_model(path, str(options["dtype"]), device_map)
            tokenizer = load_tokenizer(path)
            check_lengths(model, settings)
            if team.leads:
                save_options(folder, options)
            result = compress(model, tokenizer, settings, workspace, public_name(name), team)
            if team.leads and options["front"]:
                _write_front(settings, result, workspace)
        return result if team.leads else None


def _write_front(settings: CompressSettings, result: Compressed, workspace: Workspace) -> None:
    from moa.eval.front import budget_front, write_front
    from moa.profile.artefact import Profile

    profile = Profile.load(workspace.folder / "profile.safetensors")
    write_front(budget_front(profile, settings, result.candidates, workspace), workspace.folder, result.plan)


def _refuse_team() -> None:
    from moa.distributed import environment
    from moa.errors import UsageError

    if environment()[1] > 1:
        raise UsageError("--dry-run needs one process; leave torchrun away")


def _estimate(name: str, settings: CompressSettings) -> Estimate:
    from moa import demo
    from moa.estimate import estimate_compress

    return estimate_compress(demo.resolve(name), settings)


def _show_estimate(found: Estimate, json: bool) -> None:
    if json:
        emit_json(found.as_dict())
        return
    emit(
        f"{found.architecture}, {found.parameters / 1e6:.1f} M parameters, {found.dtype} weights {human_bytes(found.weight_bytes)}"
    )
    rows = [
        (
            at.length_tokens,
            human_bytes(at.dense_kv_bytes),
            human_bytes(at.plan_kv_bytes),
            human_bytes(at.peak_bytes),
            f"{at.time_s:.0f}",
        )
        for at in found.lengths
    ]
    emit_table(("tokens", "dense KV", f"KV at {found.density:.4g}", "peak memory", "seconds"), rows)
    how = " with gradient checkpointing" if found.gradient_checkpointing else ""
    rough = "" if found.memory_by == "simulation" else ", by a rule of thumb"
    peak = human_bytes(found.peak_bytes)
    emit(f"In all about {found.time_s:.0f} s on this machine; peak memory about {peak}{how}{rough}.")
    if found.warning:
        note(f"moa: warning: {found.warning}")


def _show_result(result: Compressed, folder: Path, json: bool) -> None:
    from moa.calibration import summary
    from moa.optimize.budget import budget_text

    plan = result.plan
    lengths = [{**at.model_dump(), "kv_bytes": plan.kv_bytes(at.length_tokens)} for at in plan.lengths]
    if json:
        emit_json(
            {
                "plan": str(folder / "plan.json"),
                "sha256": plan.sha256,
                "lengths": lengths,
                "budget": plan.objective.budget.model_dump() if plan.objective and plan.objective.budget else None,
                "validation": plan.validation.model_dump() if plan.validation else None,
                "solver": plan.solver.model_dump() if plan.solver else None,
                "true_losses": list(result.true_losses),
                "calibration": plan.calibration.model_dump() if plan.calibration else None,
            }
        )
        return
    emit(f"{folder / 'plan.json'}: {plan.distinct_rules} rules, sha256 {plan.sha256[:12]}")
    rows = [(at["length_tokens"], f"{at['density_ratio']:.4f}", human_bytes(at["kv_bytes"])) for at in lengths]
    emit_table(("tokens", "density", "KV"), rows)
    if plan.objective and plan.objective.budget:
        emit(f"Budget: {budget_text(plan.objective.budget)}.")
    if plan.solver and plan.solver.gap_ratio is not None:
        made = plan.solver
        emit(
            f"Made by {made.name} (HiGHS: {made.milp_status}); no plan's predicted loss is more than {made.gap_ratio:.2%} lower."
        )
    if plan.calibration:
        emit(summary(plan.calibration))
    if plan.validation:
        at = plan.validation
        emit(
            f"Answer loss at {at.length_tokens} tokens (not profiled): {at.sparse_loss:.4f} nats per token, "
            f"dense {at.dense_loss:.4f}; best of {at.candidates} candidates."
        )
