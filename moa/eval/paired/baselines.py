"""Ways of running a model to compare a plan with, at the plan's KV bytes, by the names that the field calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from moa.errors import ProfileError, UsageError, closest
from moa.eval.paired.presses import press_way
from moa.eval.paired.run import Way
from moa.optimize.baselines import baseline_plan, streaming_window
from moa.plan import PLAN_NAME, Plan
from moa.profile.artefact import Profile
from moa.spans import LengthMode

PROFILE_NAME = "profile.safetensors"
KVPRESS = "kvpress:"


@dataclass(frozen=True, slots=True)
class PlanBaseline:
    """A baseline that is a plan: its name in `moa.optimize.baselines`, its length mode, and what to say of it.

    "pinned" keeps one window from a text's first token to its last, as the methods were published.
    """

    kind: str
    mode: LengthMode
    says: str


PLANS = {
    "streamingllm": PlanBaseline("uniform", "pinned", "one window for all heads and the whole text"),
    "uniform": PlanBaseline("uniform", "running", "one share of the text so far for all heads"),
    "duo": PlanBaseline("duo", "pinned", "some heads dense, the others one window for the whole text"),
    "pyramid": PlanBaseline("pyramid", "pinned", "PyramidKV's budgets, falling from layer to layer, as windows"),
}


def baseline_ways(
    names: Sequence[str],
    plan: Plan,
    model: PreTrainedModel,
    lengths_tokens: Sequence[int],
    *,
    profile: Path | None = None,
    backend: str = "torch",
    allow_other_weights: bool = False,
    equal_to: str = "moa",
) -> list[Way]:
    """Baselines by name, each at the plan's KV bytes at every length.

    Args:
        names: of `PLANS`, or `kvpress:NAME`; "dense" is always evaluated and adds nothing.
        plan: whose bytes are matched.
        model: that will be run.
        profile: ranks the heads for "duo".
        backend, allow_other_weights: of baselines that are plans, as for the plan.
        equal_to: name of the plan's variant.

    Raises:
        UsageError: there is no such baseline, it cannot be run here, or "duo" has no profile.
        ProfileError: the profile is none, or another model's.
        MoaError: kvpress is wanted and not installed.
    """
    ways = []
    for name in dict.fromkeys(names):
        if name == "dense":
            continue
        if name.startswith(KVPRESS):
            ways.append(press_way(name.removeprefix(KVPRESS), plan, model, equal_to=equal_to))
            continue
        made, settings = _plan_baseline(name, plan, lengths_tokens, profile)
        way = Way.under(made, name=name, backend=backend, allow_other_weights=allow_other_weights)
        ways.append(replace(way, settings=settings, equal_to=equal_to))
    return ways


def profile_beside(plan: str) -> Path | None:
    """The influence profile that `moa compress` left beside a plan that is named by its file or folder."""
    place = Path(plan)
    beside = (place if place.is_dir() else place.parent) / PROFILE_NAME
    return beside if place.exists() and beside.is_file() else None


def _plan_baseline(
    name: str, plan: Plan, lengths_tokens: Sequence[int], place: Path | None
) -> tuple[Plan, dict[str, str]]:
    if name not in PLANS:
        known = [*PLANS, "dense", f"{KVPRESS}NAME"]
        raise UsageError(f"baselines are {', '.join(known)}, got {name!r}{closest(name, known)}")
    kind = PLANS[name]
    profile = _profile(plan, place) if kind.kind == "duo" else None
    densities = [plan.at_length(n).density_ratio for n in lengths_tokens]
    made = baseline_plan(
        kind.kind,
        plan.model,
        densities,
        lengths_tokens,
        sink_tokens=plan.sink_tokens,
        min_span_tokens=plan.min_span_tokens,
        profile=profile,
        length_mode=kind.mode,
    )
    settings = {"spans": kind.says, "sink_tokens": f"{plan.sink_tokens}", "length_mode": kind.mode}
    settings["tokens"] = "; ".join(_spans(made, n) for n in lengths_tokens)
    if profile is not None:
        window = streaming_window(lengths_tokens, densities, plan.sink_tokens, plan.min_span_tokens)
        settings["dense heads"] = _dense_heads(made, window)
    return made, settings


def _profile(plan: Plan, place: Path | None) -> Profile:
    if place is None:
        raise UsageError(
            f"the baseline 'duo' ranks heads by an influence profile, and there is no {PROFILE_NAME} beside the plan; "
            f"name one with --profile, or a plan in the folder that moa compress wrote ({PLAN_NAME} and {PROFILE_NAME})"
        )
    profile = Profile.load(place)
    for what in ("architecture", "layers", "kv_heads", "fingerprint"):
        ours, theirs = getattr(plan.model, what), getattr(profile.model, what)
        if ours != theirs and "" not in (ours, theirs):
            raise ProfileError(f"{place}: the profile is of another model: its {what} is {theirs}, the plan's {ours}")
    return profile


def _spans(plan: Plan, n_tokens: int) -> str:
    spans = sorted({int(span) for span in plan.span_rules.span(n_tokens).flat})
    told = f"{spans[0]:,}" if len(spans) == 1 else f"{spans[0]:,} to {spans[-1]:,}"
    return f"{told} of {n_tokens:,}"


def _dense_heads(plan: Plan, window_tokens: int) -> str:
    rules = [rule for layer in plan.rules for rule in layer]
    dense = sum(rule == (0, 1.0) for rule in rules)
    return (
        f"{dense} of {len(rules)} KV heads, those whose predicted loss is the largest under a window of {window_tokens:,} "
        "tokens (influence profile; DuoAttention trains gates)"
    )
