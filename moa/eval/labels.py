"""How methods, shares, bytes and intervals are written, the same in pictures, tables and the terminal."""

from __future__ import annotations

from moa.eval.records import DENSE, MethodResult, Score, Spread

METHOD_LABELS = {
    DENSE: "dense",
    "uniform": "uniform span (StreamingLLM)",
    "moa-estimator": "MoA's estimator",
    "joint": "moa",
}


def method_label(method: str) -> str:
    """What a method is called in front of a reader; unknown methods keep their name."""
    return METHOD_LABELS.get(method, method)


def result_label(result: MethodResult) -> str:
    """`moa, 25 %`: method and density budget."""
    budget = result.density_budget_ratio
    return method_label(result.method) + ("" if budget is None else f", {percent(budget)}")


def percent(ratio: float) -> str:
    """`12.5 %`: at most three digits, no trailing zeros."""
    return f"{100 * ratio:.3g} %" if ratio < 1 else f"{100 * ratio:.0f} %"


def interval(score: Score) -> str:
    """`0.97 [0.92, 0.99]`: accuracy and its 95 % interval."""
    return f"{score.accuracy_ratio:.2f} [{score.low_ratio:.2f}, {score.high_ratio:.2f}]"


def spread(value: Spread, scale: float = 1.0) -> str:
    """`1.23 (1.20 to 1.31)`: median, least and greatest, in three digits."""
    median, least, greatest = (_three_digits(scale * x) for x in (value.median, value.minimum, value.maximum))
    return f"{median} ({least} to {greatest})"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
