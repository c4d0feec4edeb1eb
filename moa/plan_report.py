"""What a plan keeps and costs, as plain data: for `moa plan show`, `diff`, `schema` and for reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moa.errors import PlanError
from moa.plan import Plan
from moa.spans import ElasticRule

SCHEMA_FILE = Path(__file__).with_name("plan.schema.json")


def summary(plan: Plan, lengths_tokens: Sequence[int]) -> dict[str, object]:
    """Rules and costs of a plan; with a single length its costs stand at the top as well as under "lengths"."""
    costs = [cost_at(plan, n) for n in lengths_tokens]
    records = {name: getattr(plan, name) for name in ("objective", "solver", "calibration", "validation", "created_by")}
    return {
        **(costs[0] if len(costs) == 1 else {}),
        "lengths": costs,
        "distinct_rules": plan.distinct_rules,
        "rules_per_layer": [len(set(layer)) for layer in plan.rules],
        "dense_heads": sum(ElasticRule(*rule).is_dense for layer in plan.rules for rule in layer),
        "kv_heads_total": plan.model.layers * plan.model.kv_heads,
        "model": plan.model.model_dump(mode="json"),
        "length_mode": plan.length_mode,
        "sink_tokens": plan.sink_tokens,
        "min_span_tokens": plan.min_span_tokens,
        "sha256": plan.sha256,
        **{name: record.model_dump(mode="json") for name, record in records.items() if record is not None},
    }


def cost_at(plan: Plan, n_tokens: int) -> dict[str, object]:
    """Density and KV bytes of one sequence of `n_tokens`, the dense cache's bytes beside them."""
    cost = plan.at_length(n_tokens)
    kv_bytes = plan.kv_bytes(n_tokens)
    return {
        "length_tokens": n_tokens,
        "density": cost.density_ratio,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "kv_bytes": kv_bytes,
        "dense_kv_bytes": Plan.uniform(plan.model, 0, 1.0).kv_bytes(n_tokens),
    }


def comparison(first: Plan, second: Plan, lengths_tokens: Sequence[int]) -> dict[str, object]:
    """The heads whose rules differ, and the density of both plans at each length.

    Raises:
        PlanError: the plans are for models of different shape.
    """
    shapes = [(plan.model.layers, plan.model.kv_heads) for plan in (first, second)]
    if shapes[0] != shapes[1]:
        raise PlanError(
            f"plans of {shapes[0][0]} x {shapes[0][1]} and {shapes[1][0]} x {shapes[1][1]} layers x KV heads "
            "cannot be compared; name two plans for one model"
        )
    settings = ("length_mode", "sink_tokens", "min_span_tokens")
    return {
        "same": first.sha256 == second.sha256,
        "heads_total": shapes[0][0] * shapes[0][1],
        "heads": _differing_heads(first, second),
        "settings": {
            name: [getattr(first, name), getattr(second, name)]
            for name in settings
            if getattr(first, name) != getattr(second, name)
        },
        "lengths": [_densities(first, second, n) for n in lengths_tokens],
    }


def _differing_heads(first: Plan, second: Plan) -> list[dict[str, object]]:
    return [
        {"layer": i, "kv_head": j, "first": list(a), "second": list(b)}
        for i, (row_a, row_b) in enumerate(zip(first.rules, second.rules, strict=True))
        for j, (a, b) in enumerate(zip(row_a, row_b, strict=True))
        if a != b
    ]


def _densities(first: Plan, second: Plan, n_tokens: int) -> dict[str, object]:
    density = [plan.span_rules.density_ratio(n_tokens) for plan in (first, second)]
    return {
        "length_tokens": n_tokens,
        "first_density": density[0],
        "second_density": density[1],
        "difference": density[1] - density[0],
    }


def schema_json() -> str:
    """The text of `moa/plan.schema.json`, made from the model; `moa plan schema > moa/plan.schema.json` renews it."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**head, **Plan.model_json_schema()}, indent=2) + "\n"
