"""The block that a serving benchmark prints, as vLLM's does, for eyes and for parsers."""

from __future__ import annotations

from collections.abc import Sequence

from moa.eval.serving.summary import METRICS, Keys, percentile_name

WIDTH = 50
HEADINGS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def block(
    keys: Keys,
    rate: float,
    max_concurrency: int | None = None,
    *,
    percentiles: Sequence[float] = (99.0,),
    metrics: Sequence[str] = METRICS,
) -> str:
    """The lines of one run; what was not measured is left out."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines.append(_line("Successful requests:", keys["completed"]))
    lines.append(_line("Failed requests:", keys["failed"]))
    if max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", max_concurrency))
    if rate != float("inf"):
        lines.append(_line("Request rate configured (RPS):", rate))
    for label, key in _ROWS:
        if keys[key] is not None:
            lines.append(_line(label, keys[key]))
    for metric in metrics:
        lines.append(f"{HEADINGS[metric]:-^{WIDTH}}")
        for label, key in [
            ("Mean", "mean"),
            ("Median", "median"),
            *((percentile_name(p).upper(),) * 2 for p in percentiles),
        ]:
            value = keys[f"{key.lower()}_{metric}_ms"]
            lines.append(_line(f"{label} {metric.upper()} (ms):", "none" if value is None else value))
    return "\n".join([*lines, "=" * WIDTH])


_ROWS = (
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
)


def _line(label: str, value: object) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value!s:<10}"
