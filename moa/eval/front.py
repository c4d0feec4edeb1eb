"""The front over budgets: the best plan at a range of densities, beside the baselines and dense.

A plan at the asked density is one point; what a user wants to know is what a little more or less memory would buy. So the
optimizer runs again, on the same profile, at densities from the least possible one to nearly dense; the plans that trade
the lengths' losses against each other at the asked density stand beside them. Losses are predicted, not measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moa.errors import InfeasibleError
from moa.files import write_atomic
from moa.optimize.baselines import baseline_plan
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import Float64Array, Target
from moa.optimize.solve import solve
from moa.plan import Plan
from moa.planning import assignment_problem, make_plan
from moa.profile.artefact import Profile
from moa.settings import CompressSettings
from moa.spans import ElasticRule
from moa.stages import FRONT_NAME, Workspace, key_of

POINTS = 12
MOST_DENSITY = 0.9
REL_GAP = 1e-3
TIME_LIMIT_S = 20.0
BUDGETS, LENGTHS = "budgets", "lengths"
BASELINES = ("uniform", "duo", "pyramid")


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A plan and its predicted losses.

    Args:
        sweep: "budgets" or "lengths" for the optimizer's plans, else the baseline's name.
        density_budget_ratio: what the plan had to keep.
        plan: the plan.
        losses: predicted loss at every evaluated length.
        value: mean over lengths of the loss relative to the best single rule's at the asked density.
    """

    sweep: str
    density_budget_ratio: float
    plan: Plan
    losses: tuple[float, ...]
    value: float


def budget_front(
    profile: Profile, settings: CompressSettings, candidates: Sequence[Plan], workspace: Workspace
) -> tuple[FrontPoint, ...]:
    """Points of the front over budgets in order of density, the candidates at the asked density, and the baselines.

    Args:
        profile: of the model.
        settings: of the run that made it; sinks, least span, lengths and rules are taken over.
        candidates: plans at the asked density that trade the lengths against each other.
        workspace: keeps the solved plans as one resumable unit.
    """
    _, asked = assignment_problem(profile, settings)
    densities = front_densities(settings)
    key = key_of(
        model=profile.model.model_dump(),
        losses=asked.loss.tolist(),
        spans=asked.spans.tolist(),
        densities=densities,
        limit=settings.max_rules_per_layer,
        search=[settings.elastic, settings.per_layer],
        named=[profile.calibration.model_dump(), settings.budget],  # in the plans, and in no loss
    )

    def make() -> object:
        return [plan.to_json() for plan in _solved(profile, settings, densities, workspace)]

    solved = workspace.json_unit("front", key, make, _plans_from)
    weights = Target.balanced(asked).weights / len(asked.loss)

    def point(sweep: str, density: float, plan: Plan) -> FrontPoint:
        losses = predicted_losses(profile, plan, settings.unseen_tokens)
        return FrontPoint(sweep, density, plan, tuple(losses.tolist()), float(weights @ losses))

    front = better_for_more([point(BUDGETS, d, plan) for d, plan in zip(densities, solved, strict=True)])
    known = {p.plan.rules for p in front}
    return (
        *front,
        *(point(LENGTHS, settings.density, plan) for plan in candidates if plan.rules not in known),
        *(point(name, d, plan) for name, d, plan in _baselines(profile, settings, densities)),
        point("dense", 1.0, baseline_plan("dense", profile.model, 1.0, settings.budget_lengths)),
    )


def front_densities(settings: CompressSettings) -> tuple[float, ...]:
    """Densities from just above the least possible one to nearly dense, evenly on a log scale, and the asked one."""
    least = max(span / n for span, n in zip(settings.least_spans_tokens, settings.budget_lengths, strict=True))
    even = np.geomspace(min(MOST_DENSITY, 1.05 * least), MOST_DENSITY, POINTS)
    return tuple(sorted({*(float(f"{d:.4g}") for d in even), settings.density}))  # 4 digits: never below the least


def predicted_losses(profile: Profile, plan: Plan, unseen_tokens: int) -> Float64Array:
    """Predicted loss of a plan at every profiled length and the unseen one, float64 [E]."""
    distinct = tuple(ElasticRule(*rule) for rule in dict.fromkeys(rule for layer in plan.rules for rule in layer))
    index = {(rule.alpha, rule.beta): i for i, rule in enumerate(distinct)}
    picks = np.array([[index[rule] for rule in layer] for layer in plan.rules])  # [L, HKV]
    losses = profile.rule_losses(distinct, unseen_tokens=unseen_tokens)  # [E, L, HKV, R]
    return np.asarray(np.take_along_axis(losses, picks[None, :, :, None], axis=3).sum(axis=(1, 2, 3)))


def _solved(
    profile: Profile, settings: CompressSettings, densities: Sequence[float], workspace: Workspace
) -> list[Plan]:
    rules, asked = assignment_problem(profile, settings)
    target = Target.balanced(asked)  # one measure for all densities
    plans = []
    with MilpWorker() as worker:
        for density in densities:
            problem = replace(asked, density_budget=(density,) * len(asked.budget_lengths))
            found = solve(problem, target, rel_gap=REL_GAP, time_limit_s=TIME_LIMIT_S, worker=worker, always_milp=False)
            at_density = settings if density == settings.density else replace(settings, density=density, budget=None)
            plans.append(make_plan(found, rules, problem, profile, at_density))
            workspace.progress("front", len(plans), len(densities))
    return plans


def _plans_from(content: object) -> tuple[Plan, ...]:
    if not isinstance(content, list) or not content:
        raise ValueError("wanted a list of plans")
    return tuple(Plan.from_json(str(text), "front stage") for text in content)


def better_for_more(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Those that no cheaper point matches: with few heads two budgets can have one best plan."""
    kept: list[FrontPoint] = []
    for point in points:
        if not kept or point.value < kept[-1].value:
            kept.append(point)
    return kept


def _baselines(
    profile: Profile, settings: CompressSettings, densities: Sequence[float]
) -> list[tuple[str, float, Plan]]:
    sink, least = settings.spans
    found = []
    for name in BASELINES:
        for density in densities:
            try:
                plan = baseline_plan(
                    name,
                    profile.model,
                    density,
                    settings.budget_lengths,
                    sink_tokens=sink,
                    min_span_tokens=least,
                    profile=profile,
                )
            except InfeasibleError:
                continue  # a file's rules can be shorter on average than what every head needs alone
            found.append((name, density, plan))
    return found


def write_front(points: Sequence[FrontPoint], folder: Path, chosen: Plan) -> None:
    """Write `front/plan-000.json` and on for the optimizer's plans, `front/front.csv` and `front/front.png`.

    Args:
        points: of `budget_front`.
        folder: the run's folder; plans of an earlier front there are deleted.
        chosen: the run's plan, marked in the picture.
    """
    from moa.eval.front_figure import front_picture

    place = folder / FRONT_NAME
    for old in place.glob("plan-*.json"):
        old.unlink()
    names: list[str] = []
    for point in points:
        made = point.sweep in (BUDGETS, LENGTHS)
        names.append(f"plan-{len([n for n in names if n]):03}.json" if made else "")
        if made:
            point.plan.save(place / names[-1])
    write_atomic(place / "front.csv", _csv(points, names).encode())
    write_atomic(place / "front.png", front_picture(points, chosen))


def _csv(points: Sequence[FrontPoint], names: Sequence[str]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    lengths = [at.length_tokens for at in points[0].plan.lengths]
    evaluated = lengths[: len(points[0].losses)]
    table.writerow(
        ["plan", "sweep", "density_budget_ratio", "predicted_loss", "solver", "gap_ratio"]
        + [f"predicted_loss_at_{n}" for n in evaluated]
        + [f"{what}_at_{n}" for n in lengths for what in ("density_ratio", "kv_bytes_per_token")]
    )
    for point, name in zip(points, names, strict=True):
        solver = point.plan.solver
        gap = solver.gap_ratio if solver else None
        table.writerow(
            [name, point.sweep, point.density_budget_ratio, f"{point.value:.6g}", solver.name if solver else ""]
            + ["" if gap is None else f"{gap:.3g}"]
            + [f"{loss:.6g}" for loss in point.losses]
            + [f"{x:.6g}" for at in point.plan.lengths for x in (at.density_ratio, at.kv_bytes_per_token)]
        )
    return text.getvalue()
