"""The plan card: a README.md with front matter, made from a plan alone, for people and for a hub's search.

What a plan says of itself is data here too: in the front matter YAML quotes it, in the text it stands in code spans, where
no Markdown or HTML is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

import yaml

from moa.eval.labels import percent
from moa.eval.markdown import NOT_MEASURED, table
from moa.hub_files import REPO_ID
from moa.local_paths import looks_local
from moa.plan import Objective, Plan
from moa.units import human_bytes

CARD_NAME = "README.md"
FALLBACK_LENGTHS = (4096, 16384, 65536)
TAGS = ("moa", "kv-cache", "sparse-attention", "long-context")
MAX_TEXT = 200


def plan_card(plan: Plan) -> str:
    """The text of the card; the same plan gives the same text."""
    front = yaml.safe_dump(front_matter(plan), sort_keys=False, width=10_000)
    parts = [f"---\n{front}---", *_heading(plan), *_costs(plan), *_accuracy(plan), *_use(plan), *_provenance(plan)]
    return "\n\n".join(parts) + "\n"


def front_matter(plan: Plan) -> dict[str, object]:
    """What a hub reads: the base model where its name is a hub id, library, tags, and the plan's figures under "moa"."""
    name, seen = plan.model.name, plan.validation
    figures: dict[str, object] = {
        "plan_sha256": plan.sha256,
        "architecture": _clean(plan.model.architecture),
        "lengths_tokens": [at.length_tokens for at in plan.lengths],
        "density_ratio": [at.density_ratio for at in plan.lengths],
    }
    if seen:
        figures["validation"] = {
            "length_tokens": seen.length_tokens,
            "dense_loss": seen.dense_loss,
            "sparse_loss": seen.sparse_loss,
        }
    # a hub refuses a card whose base model cannot be one
    base = {"base_model": name} if REPO_ID.fullmatch(name) else {}
    return {**base, "library_name": "moa", "tags": list(TAGS), "moa": figures}


def _clean(text: str) -> str:
    """One line of printable text, cut where it is too long for a name."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."


def _code(text: str) -> str:
    """Text as a code span, which shows it as it is."""
    return f"`{_clean(text).replace('`', chr(39))}`" if _clean(text) else NOT_MEASURED


def _last_part(name: str) -> str:
    """The last part of what looks like a place on somebody's machine; older plans name such."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if looks_local(name) else name


def _mixture(mixed: bool | None) -> str:
    return "" if mixed is None else ", texts of half of each to all of it" if mixed else ", texts of just these"


def _heading(plan: Plan) -> Iterator[str]:
    shape = plan.model
    yield f"# Attention plan for {_code(_last_part(shape.name) or shape.architecture)}"
    yield (
        f"An elastic attention span for each of the {shape.layers} x {shape.kv_heads} KV heads (layers x heads) of "
        f"{_code(shape.architecture)}: {plan.distinct_rules} different rules `alpha + beta * n`, at least "
        f"{plan.min_span_tokens} tokens each, the first {plan.sink_tokens} always kept. "
        "It holds no weights, and it is lossy: look at your own task before you trust it."
    )


def _costs(plan: Plan) -> Iterator[str]:
    dense, rows = Plan.uniform(plan.model, 0, 1.0), []
    for n in [at.length_tokens for at in plan.lengths] or FALLBACK_LENGTHS:
        sizes = [human_bytes(any_plan.kv_bytes(n)) for any_plan in (plan, dense)]
        rows.append([f"{n:,}", percent(plan.at_length(n).density_ratio), *sizes])
    yield "## Keys and values of one sequence"
    yield f"Computed from the spans, in {plan.model.dtype}."
    yield table(["tokens", "density", "this plan", "dense"], rows)


def _accuracy(plan: Plan) -> Iterator[str]:
    yield "## Loss beside dense"
    seen = plan.validation
    if seen is None:
        yield "Not measured."
        return
    yield (
        f"Mean loss per answer token at {seen.length_tokens:,} tokens, a length that was not profiled, over "
        f"{seen.samples} texts; the best of {seen.candidates} candidates on these texts."
    )
    losses = [("dense", seen.dense_loss), ("this plan", seen.sparse_loss)]
    rows = [[name, f"{loss:.4f}", f"{math.exp(loss):.4f}" if loss < 50 else NOT_MEASURED] for name, loss in losses]
    yield table(["", "loss, nats", "perplexity"], rows)


def _use(plan: Plan) -> Iterator[str]:
    name = _clean(_last_part(plan.model.name))
    # what is no hub id lay in a folder on somebody's machine, or its id has no organisation: only the reader knows
    is_id = REPO_ID.fullmatch(name) is not None
    hint = "" if is_id else "  # the folder of your copy of this model, or its hub id"
    # a JSON string of ASCII is a Python literal too; a backtick could end the fence
    model = json.dumps(name if is_id else f"PATH/TO/{name or 'MODEL'}").replace("`", "\\u0060")
    yield "## Use"
    yield (
        "```python\nimport moa\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({model}){hint}\n"
        'moa.apply(model, "PLAN")  # this repository\'s id, or the folder with plan.json; then generate as ever\n```'
    )


def _search(objective: Objective) -> str:
    """What the optimizer could choose from, "" where that was everything."""
    limits = ["fixed windows only"] * (not objective.elastic) + ["one rule per layer"] * objective.per_layer
    return ", ".join(limits)


def _provenance(plan: Plan) -> Iterator[str]:
    made = plan.created_by
    facts = {
        "plan sha256": plan.sha256,
        "model fingerprint": plan.model.fingerprint,
        "model revision": plan.model.revision,
        "length mode": plan.length_mode,
        "versions": f"moa {made.moa}, torch {made.torch}, transformers {made.transformers}" if made else "",
    }
    if plan.objective:
        facts["density budget"] = percent(plan.objective.density_budget_ratio)
        facts["chosen from"] = _search(plan.objective)
    if plan.solver:
        gap = "" if plan.solver.gap_ratio is None else f", gap {plan.solver.gap_ratio:.2%}"
        facts["solver"] = f"{plan.solver.name}, {plan.solver.status}{gap}"
    if plan.calibration:
        c = plan.calibration
        facts |= {
            "calibration data": _last_part(c.dataset),
            "calibration file sha256": c.dataset_file_sha256,
            "calibration texts sha256": c.dataset_sha256,
            "calibration": f"{c.samples_per_length} texts per length, seed {c.seed}, estimator {c.estimator}, "
            f"answers by the {c.supervision}" + (f", every {c.weighting} of them alike" if c.weighting else ""),
            "profiled lengths": ", ".join(f"{n:,}" for n in c.lengths_tokens) + _mixture(c.mixed_lengths),
            "influence computed by": ", ".join(c.influence_backends),
        }
    yield "## Where it comes from"
    yield table(["", "value"], [[name, _code(value)] for name, value in facts.items() if value])
