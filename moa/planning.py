"""From a profile to plans: the assignment problem that a budget poses, and its solutions with where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from moa.errors import MoaError
from moa.optimize.grid import rule_grid, span_table
from moa.optimize.pareto import pareto_front
from moa.optimize.problem import Assignment, AssignmentProblem, Target
from moa.plan import CreatedBy, Objective, Plan, SolverRecord
from moa.profile.artefact import Profile
from moa.settings import CompressSettings
from moa.spans import ElasticRule


def assignment_problem(
    profile: Profile, settings: CompressSettings
) -> tuple[tuple[ElasticRule, ...], AssignmentProblem]:
    """The candidate rules, and what the optimizer is to choose among them under the settings' budget."""
    lengths, unseen = settings.lengths_tokens, settings.unseen_tokens
    rules = settings.rules or rule_grid(lengths, *settings.spans, extrapolation_tokens=unseen, elastic=settings.elastic)
    problem = AssignmentProblem(
        loss=profile.rule_losses(rules, unseen_tokens=unseen),
        spans=span_table(rules, settings.budget_lengths, profile.min_span_tokens),
        budget_lengths=settings.budget_lengths,
        density_budget=(settings.density,) * len(settings.budget_lengths),
        max_rules_per_layer=settings.max_rules_per_layer,
        loss_lengths=(*lengths, unseen),
        per_layer=settings.per_layer,
    )
    return rules, problem


def candidates(
    rules: Sequence[ElasticRule], problem: AssignmentProblem, profile: Profile, settings: CompressSettings
) -> list[Plan]:
    """The `max_candidates` plans of the Pareto front with the least loss relative to the uniform plan's, best first."""
    weights = Target.balanced(problem).weights
    front = sorted(pareto_front(problem, levels=settings.front_levels), key=lambda found: float(weights @ found.losses))
    return [make_plan(found, rules, problem, profile, settings) for found in front[: settings.max_candidates]]


def make_plan(
    found: Assignment,
    rules: Sequence[ElasticRule],
    problem: AssignmentProblem,
    profile: Profile,
    settings: CompressSettings,
) -> Plan:
    """The plan of an assignment, with what it was made from and under which budget."""
    pairs = [[(rules[r].alpha, rules[r].beta) for r in layer] for layer in found.rules.tolist()]
    _check_search(pairs, settings)
    plan = Plan(
        model=profile.model,
        sink_tokens=profile.sink_tokens,
        min_span_tokens=profile.min_span_tokens,
        rules=tuple(tuple(layer) for layer in pairs),
        objective=Objective(
            predicted_loss=found.value,
            density_budget_ratio=settings.density,
            lengths_tokens=settings.lengths_tokens,
            max_rules_per_layer=settings.max_rules_per_layer,
            budget=settings.budget,
            elastic=settings.elastic,
            per_layer=settings.per_layer,
        ),
        solver=SolverRecord(
            name=found.solver,
            status=found.status,
            milp_status=found.milp_status,
            bound=found.bound,
            gap_ratio=found.gap_ratio,
        ),
        calibration=profile.calibration,
        created_by=CreatedBy(moa=version("moa"), torch=version("torch"), transformers=version("transformers")),
    )
    return renewed(plan, lengths=tuple(plan.at_length(n) for n in problem.budget_lengths))


def _check_search(pairs: Sequence[Sequence[tuple[int, float]]], settings: CompressSettings) -> None:
    """Look again whether the rules are such as were asked for.

    Raises:
        MoaError: they are not.
    """
    if not settings.elastic and any(beta != 0 for layer in pairs for _, beta in layer):
        raise MoaError(
            "a span of the plan grows with the length although --no-elastic was asked for; this is a bug in moa"
        )
    if settings.per_layer and any(len(set(layer)) > 1 for layer in pairs):
        raise MoaError("a layer of the plan has two rules although --per-layer was asked for; this is a bug in moa")


def renewed(plan: Plan, **fields: object) -> Plan:
    """The plan with some fields replaced and its digest made anew."""
    kept = {name: getattr(plan, name) for name in Plan.model_fields}
    return Plan.model_validate({**kept, "sha256": "", **fields})
