"""`moa plan`: look at plans, check them, make them from other projects' files, compare them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moa.cli.output import emit, emit_json, emit_table, note, require_free
from moa.units import human_bytes

if TYPE_CHECKING:
    from moa.plan import Plan

app = typer.Typer(help="Show, check, convert and compare plans.", no_args_is_help=True, rich_markup_mode=None)

PlanFile = Annotated[Path, typer.Argument(help="A plan, the folder that holds plan.json, or a hub id like org/name.")]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", min=1, max=2**40 - 1, help="Length in tokens; repeat for several. Default: the plan's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object.")]
ModelPath = Annotated[
    Path | None, typer.Option("--model", help="Also check that the plan fits this model folder or config.json.")
]
FALLBACK_LENGTHS = (4096, 16384, 65536)


@app.command()
def show(plan: PlanFile, length: Lengths = None, json: AsJson = False) -> None:
    """Show what a plan keeps, what that costs, and where it comes from."""
    from moa.plan import load_plan
    from moa.plan_report import summary

    loaded = load_plan(plan)
    content = summary(loaded, length or _lengths(loaded))
    if json:
        emit_json(content)
    else:
        _show_text(loaded, content)


@app.command()
def validate(plan: PlanFile, model: ModelPath = None) -> None:
    """Check that a file is a valid plan, and that it fits a model if one is named; exit code 3 if not."""
    from moa.model_config import check_model, read_model_config
    from moa.plan import load_plan

    loaded = load_plan(plan)
    if model is not None:
        check_model(loaded, read_model_config(model), str(plan))
    emit(f"{plan}: ok (sha256 {loaded.sha256})")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="MoA's alphas/betas JSON, or DuoAttention's pattern (.tsv or folder).")],
    model_config: Annotated[Path, typer.Option("--model-config", help="The model's config.json, or its folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    form: Annotated[
        Literal["auto", "moa", "duo"], typer.Option("--format", help="Whose form the file has; auto looks at its name.")
    ] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**40 - 1, help="Cover all query heads up to this length. Default: the model's longest."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="DuoAttention score from which on a head is dense.")] = 0.5,
    length: Lengths = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plan if it exists.")] = False,
) -> None:
    """Turn a plan of thu-nics/MoA or a pattern of DuoAttention into a plan."""
    from moa.model_config import read_model_config
    from moa.plan_import import ImportOptions, import_plan

    require_free(output, overwrite)
    options = ImportOptions(max_length, threshold, tuple(length) if length else None)
    plan = import_plan(file, read_model_config(model_config), form, options)
    plan.save(output)
    for cost in plan.lengths:
        note(f"density {cost.density_ratio:.3f} at {cost.length_tokens:,} tokens")
    emit(str(output))


@app.command()
def baseline(
    name: Annotated[Literal["uniform", "duo", "pyramid", "dense"], typer.Argument(help="Which one.")],
    model: Annotated[str, typer.Argument(help="Model folder or hub id; 'demo' is the model that ships with moa.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    density: Annotated[float, typer.Option(help="Share of the KV cache to keep, in (0, 1].")] = 0.5,
    length: Annotated[
        list[int] | None,
        typer.Option("--length", min=1, help="Length at which it keeps that share; repeat for several."),
    ] = None,
    sink_tokens: Annotated[int, typer.Option(min=0, help="First tokens that every head keeps.")] = 64,
    min_span_tokens: Annotated[int, typer.Option(min=1, help="Least span, sinks included.")] = 128,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="OUT/profile.safetensors of moa compress: ranks the heads for 'duo'. Its model, sinks and least span "
            "are taken."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the cache; 'auto' is the checkpoint's.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plan if it exists.")] = False,
) -> None:
    """Make a plan to compare with, at equal KV bytes: uniform (StreamingLLM), duo (DuoAttention), pyramid, dense."""
    from moa import demo
    from moa.hf.size import model_size
    from moa.optimize.baselines import baseline_plan
    from moa.profile.artefact import Profile

    require_free(output, overwrite)
    measured = None if profile is None else Profile.load(profile)
    shape = model_size(demo.resolve(model), dtype).shape if measured is None else measured.model
    sizes = (sink_tokens, min_span_tokens) if measured is None else (measured.sink_tokens, measured.min_span_tokens)
    plan = baseline_plan(
        name,
        shape,
        density,
        length or FALLBACK_LENGTHS,
        sink_tokens=sizes[0],
        min_span_tokens=sizes[1],
        profile=measured,
    )
    plan.save(output)
    for cost in plan.lengths:
        note(f"density {cost.density_ratio:.4f} at {cost.length_tokens:,} tokens")
    emit(str(output))


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A plan.")],
    second: Annotated[Path, typer.Argument(help="Another plan for the same model.")],
    length: Lengths = None,
    json: AsJson = False,
) -> None:
    """Show which heads two plans treat differently, and what that changes."""
    from moa.plan import load_plan
    from moa.plan_report import comparison

    plans = load_plan(first), load_plan(second)
    lengths = length or sorted({n for plan in plans for n in _lengths(plan)})
    content = comparison(*plans, lengths)
    if json:
        emit_json(content)
    else:
        _diff_text(content)


@app.command()
def card(
    plan: PlanFile,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write. Default: stdout.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write the plan's card: a README.md with front matter for a hub, made from the plan alone."""
    from moa.files import write_atomic
    from moa.plan import load_plan
    from moa.plan_card import plan_card

    text = plan_card(load_plan(plan))
    if output is None:
        typer.echo(text, nl=False)
        return
    require_free(output, overwrite)
    write_atomic(output, text.encode())
    emit(str(output))


@app.command()
def schema() -> None:
    """Write the JSON Schema of a plan."""
    from moa.plan_report import schema_json

    typer.echo(schema_json(), nl=False)


def _lengths(plan: Plan) -> list[int]:
    return [cost.length_tokens for cost in plan.lengths] or list(FALLBACK_LENGTHS)


def _show_text(plan: Plan, content: Mapping[str, Any]) -> None:
    from moa.optimize.budget import budget_text

    model = plan.model
    emit(f"model          {model.architecture} {model.name}".rstrip())
    emit(
        f"shape          {model.layers} layers, {model.heads} heads, {model.kv_heads} KV heads of {model.head_dim}, {model.dtype}"
    )
    emit(
        f"length mode    {plan.length_mode}, {plan.sink_tokens} sinks, spans of at least {plan.min_span_tokens} tokens"
    )
    emit(f"rules          {plan.distinct_rules} distinct, {_range(content['rules_per_layer'])} per layer")
    emit(f"dense heads    {content['dense_heads']} of {content['kv_heads_total']}")
    emit(f"sha256         {plan.sha256}")
    if plan.solver:
        gap = plan.solver.gap_ratio
        emit(f"solver         {plan.solver.name}, {plan.solver.status}{'' if gap is None else f', gap {gap:.2%}'}")
    if plan.objective and plan.objective.budget:
        emit(f"budget         {budget_text(plan.objective.budget)}")
    if plan.validation:
        seen = plan.validation
        losses = f"loss {seen.sparse_loss:.4f}, dense {seen.dense_loss:.4f}"
        emit(f"validation     {losses}, at {seen.length_tokens:,} tokens over {seen.samples} samples")
    emit("")
    emit_table(
        ("tokens", "density", "KV per token", "KV", "dense KV"), [_cost_row(cost) for cost in content["lengths"]]
    )
    emit("")
    emit_table(
        ("layer", "rules (heads x alpha+beta*n)"), [(i, _layer_text(layer)) for i, layer in enumerate(plan.rules)]
    )


def _cost_row(cost: Mapping[str, Any]) -> tuple[object, ...]:
    sizes = (cost[key] for key in ("kv_bytes_per_token", "kv_bytes", "dense_kv_bytes"))
    return (cost["length_tokens"], f"{cost['density']:.4f}", *map(human_bytes, sizes))


def _layer_text(layer: Sequence[tuple[int, float]]) -> str:
    counts = Counter(layer).most_common()
    return ", ".join(f"{count} x {_rule_text(*rule)}" for rule, count in counts)


def _rule_text(alpha: int, beta: float) -> str:
    if alpha >= 0 and beta == 1:
        return "dense"
    if not beta:
        return str(alpha)
    return f"{alpha}{beta:+.4g}*n" if alpha else f"{beta:.4g}*n"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _diff_text(content: Mapping[str, Any]) -> None:
    emit(f"{len(content['heads'])} of {content['heads_total']} KV heads differ")
    for name, (one, other) in content["settings"].items():
        emit(f"{name}: {one} and {other}")
    if content["heads"]:
        emit("")
        rows = [(h["layer"], h["kv_head"], _rule_text(*h["first"]), _rule_text(*h["second"])) for h in content["heads"]]
        emit_table(("layer", "KV head", "first", "second"), rows)
    emit("")
    keys = ("first_density", "second_density")
    rows = [(c["length_tokens"], *(f"{c[k]:.4f}" for k in keys), f"{c['difference']:+.4f}") for c in content["lengths"]]
    emit_table(("tokens", "first", "second", "difference"), rows)
