"""A paired evaluation on paper: tables per length and task, and files that others can read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moa.eval.markdown import NOT_MEASURED, table
from moa.eval.paired.records import DENSE, Difference, PairedReport, TaskScores
from moa.eval.paired.run import Outcome
from moa.eval.paired.statistics import mean_interval
from moa.files import write_atomic
from moa.units import human_bytes

REPORT_JSON, REPORT_MD, RESULTS_FOLDER = "eval.json", "eval.md", "lm_eval"
DEPTH_BUCKETS = 5


def write_outcome(outcome: Outcome, folder: Path, *, log_samples: bool) -> PairedReport:
    """Write `eval.json`, `eval.md` and, by variant, lm-eval's own results; the report that names the latter.

    Args:
        log_samples: also lm-eval's samples, prompts and answers in full.

    Raises:
        ResourceError, InputError: the files cannot be written.
    """
    stamp = outcome.report.conditions.date.replace(":", "-")
    variants = []
    for variant in outcome.report.variants:
        place = folder / RESULTS_FOLDER / variant.name
        path = place / f"results_{stamp}.json"
        _write_results(outcome.results[variant.name], outcome.report, path)
        if log_samples:
            for task, samples in outcome.results[variant.name]["samples"].items():
                write_atomic(place / f"samples_{task}_{stamp}.jsonl", _lines(samples))
        variants.append(variant.model_copy(update={"results_file": str(path.relative_to(folder))}))
    report = outcome.report.model_copy(update={"variants": tuple(variants)})
    write_atomic(folder / REPORT_MD, to_markdown(report).encode())
    write_atomic(folder / REPORT_JSON, json.dumps(to_json(report), indent=1, allow_nan=False).encode())
    return report


def to_json(report: PairedReport) -> dict[str, Any]:
    """The report with what is computed from it: differences and problems."""
    computed = {
        "differences": [difference.model_dump(mode="json") for difference in report.differences],
        "truncated": report.truncated,
        "unpaired": report.unpaired,
        "problems": list(report.problems()),
    }
    return {**report.model_dump(mode="json"), **computed}


def from_json(content: dict[str, Any]) -> PairedReport:
    """The report of a file that `to_json` made; what was computed is computed again.

    Raises:
        ValueError: it is none.
    """
    given = {name: content[name] for name in PairedReport.model_fields if name in content}
    return PairedReport.model_validate_json(json.dumps(given))


def to_markdown(report: PairedReport) -> str:
    """Conditions, problems, a table per length, and where in the texts answers were found."""
    parts = [f"# {report.conditions.model_name}: evaluation", *_problems(report), *_conditions(report)]
    parts += [*tables(report), *_depths(report)]
    return "\n\n".join(parts) + "\n"


def _write_results(results: dict[str, Any], report: PairedReport, path: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    content = {name: value for name, value in results.items() if name != "samples"}
    content["task_hashes"] = {task.name: task.samples_hash for task in report.tasks}
    content["chat_template_sha"] = report.conditions.chat_template_sha256 or None
    content["total_evaluation_time_seconds"] = str(report.conditions.time_s)
    text = json.dumps(content, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_atomic(path, text.encode())


def _lines(samples: list[dict[str, Any]]) -> bytes:
    """JSON lines in the form of lm-eval's."""
    from lm_eval.utils import handle_non_serializable, sanitize_list

    def row(sample: dict[str, Any]) -> dict[str, Any]:
        arguments = {
            f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(request)}
            for i, request in enumerate(sample["arguments"])
        }
        said = {name: sanitize_list(sample[name]) for name in ("resps", "filtered_resps")}
        return {**sample, **said, "arguments": arguments, "target": str(sample["target"])}

    return b"".join(
        json.dumps(row(sample), default=handle_non_serializable, ensure_ascii=False).encode() + b"\n"
        for sample in samples
    )


def _problems(report: PairedReport) -> Iterator[str]:
    yield from (f"**{problem[0].upper()}{problem[1:]}.**" for problem in report.problems())


def _conditions(report: PairedReport) -> Iterator[str]:
    c, e = report.conditions, report.conditions.environment
    used = (
        f"{c.max_length_tokens:,} tokens for prompt, answer and template; prompts that do not fit are cut on the left"
    )
    template = f"sha256 {c.chat_template_sha256[:12]}, {c.template_tokens} tokens" if c.chat_template_sha256 else "none"
    revision = c.model_revision + (f" ({c.model_commit[:12]})" if c.model_commit else "")
    facts = {
        "model": f"{c.model_name} ({c.architecture}, {c.parameters:,} parameters), revision {revision}",
        "fingerprint": c.model_fingerprint[:16],
        "device": f"{e.device}, {e.dtype}, {e.threads} thread{'s' if e.threads > 1 else ''}, "
        f"{c.processes} process{'es' if c.processes > 1 else ''}, batch size {c.batch_size}",
        "room": used,
        "chat template": template,
        "samples": f"{c.num_samples} per length of made-up tasks, seed {c.data_seed}; "
        f"{report.truncated} truncated, {report.unpaired} unpaired",
        "seeds": ", ".join(f"{name.removesuffix('_seed')} {value}" for name, value in c.seeds.items()),
        "tasks": ", ".join(f"{task.name} v{task.version}" for task in report.tasks),
        "versions": ", ".join(f"{name} {number}" for name, number in c.versions.items()) + f", Python {e.python}",
        "date": c.date,
        "command": f"`{c.command}`",
    }
    yield "\n".join(f"- {name}: {value}" for name, value in facts.items())
    yield from (_variant_line(report, i) for i in range(len(report.variants)))


def _variant_line(report: PairedReport, number: int) -> str:
    variant = report.variants[number]
    parts = [f"`{variant.name}`: attention {variant.attention}"]
    parts[0] += f", plan {variant.plan.sha256[:12]}" if variant.plan else ""
    parts += [", ".join(f"{name} {value}" for name, value in variant.settings.items())]
    if variant.kv and variant.name != DENSE:
        kept = (f"{human_bytes(at.kv_bytes)} ({at.ratio:.1%}) at {at.length_tokens:,}" for at in variant.kv)
        parts += ["KV kept " + ", ".join(kept)]
    if not variant.saves_memory:
        parts += ["accuracy only: keys are hidden, memory holds them all"]
    return "; ".join(part for part in parts if part) + "."


def tables(report: PairedReport) -> Iterator[str]:
    """A table per length: every task dense and under each other variant, with the differences."""
    lengths = dict.fromkeys(length for _, length, _ in report.cells)
    found = {(d.variant, d.task, d.length_tokens, d.metric): d for d in report.differences}
    others = [variant.name for variant in report.variants if variant.name != DENSE]
    for length in sorted(lengths, key=lambda n: n or 0):
        yield f"## {length:,} tokens" if length else "## Texts of any length"
        headings = ["", "samples", DENSE, *(part for name in others for part in (name, "difference", "p"))]
        rows = []
        for cell in (cell for cell in report.cells if cell[1] == length):
            dense = report.at(DENSE, cell)
            row = [_label(cell), str(len(dense.samples)) if dense else NOT_MEASURED, _mean(dense)]
            for name in others:
                row += [_mean(report.at(name, cell)), *_difference(found.get((name, *cell)))]
            rows.append(row)
        yield table(headings, [*rows, *_average(report, found, length, others)])
    if others:
        yield (
            "Differences are to dense on the same samples, with 95 % intervals: Newcombe's for paired shares (his method "
            "10), Student's t for losses in nats. p: exact McNemar test where answers are right or wrong, else t test; not "
            "corrected for the number of tasks."
        )


def _label(cell: tuple[str, int | None, str]) -> str:
    task, _, metric = cell
    return task if metric == "score" else f"{task} ({metric})"


def _mean(scores: TaskScores | None) -> str:
    if scores is None:
        return NOT_MEASURED
    return f"{100 * scores.mean:.1f} %" if scores.bounded else f"{scores.mean:.4f}"


def _difference(found: Difference | None) -> tuple[str, str]:
    if found is None:
        return NOT_MEASURED, NOT_MEASURED
    scale, unit = (100.0, 1) if found.interval == "newcombe" else (1.0, 4)
    text = f"{scale * found.difference:+.{unit}f}"
    if found.low is not None and found.high is not None:
        text += f" [{scale * found.low:+.{unit}f}, {scale * found.high:+.{unit}f}]"
    return text, _p_value(found.p_value)


def _p_value(p: float | None) -> str:
    if p is None:
        return NOT_MEASURED
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _average(
    report: PairedReport,
    found: dict[tuple[str, str, int | None, str], Difference],
    length: int | None,
    others: list[str],
) -> Iterator[list[str]]:
    """The mean over tasks whose scores are shares, where there are several."""
    cells = [c for c in report.cells if c[1] == length and (at := report.at(DENSE, c)) and at.bounded]
    if length is None or len(cells) < 2:
        return
    row = ["mean", "", f"{100 * math.fsum(s.mean for c in cells if (s := report.at(DENSE, c))) / len(cells):.1f} %"]
    for name in others:
        there = [d for c in cells if (d := found.get((name, *c)))]
        bounds = [(d.difference, d.low, d.high) for d in there if d.low is not None and d.high is not None]
        if len(bounds) != len(cells):
            row += [NOT_MEASURED] * 3
            continue
        value, low, high = (100 * part for part in mean_interval(bounds))
        row += [
            f"{100 * math.fsum(d.mean for d in there) / len(there):.1f} %",
            f"{value:+.1f} [{low:+.1f}, {high:+.1f}]",
            "",
        ]
    yield row


def _depths(report: PairedReport) -> Iterator[str]:
    """Where in the text the evidence began, for tasks that say it."""
    rows = []
    for cell in report.cells:
        for variant in report.variants:
            scores = report.at(variant.name, cell)
            if scores and scores.bounded and all(sample.depth_ratio is not None for sample in scores.samples):
                rows.append(
                    [f"{_label(cell)}, {cell[1]:,}" if cell[1] else _label(cell), variant.name, *_by_depth(scores)]
                )
    if rows:
        yield "## By depth of the evidence"
        yield "Where in the text what is asked for begins; 0 % is its start."
        bounds = [f"{100 * i // DEPTH_BUCKETS}–{100 * (i + 1) // DEPTH_BUCKETS} %" for i in range(DEPTH_BUCKETS)]
        yield table(["", "", *bounds], rows)


def _by_depth(scores: TaskScores) -> list[str]:
    buckets: list[list[float]] = [[] for _ in range(DEPTH_BUCKETS)]
    for sample in scores.samples:
        if sample.depth_ratio is not None:
            buckets[min(DEPTH_BUCKETS - 1, int(sample.depth_ratio * DEPTH_BUCKETS))].append(sample.score)
    return [f"{100 * math.fsum(b) / len(b):.0f} % of {len(b)}" if b else NOT_MEASURED for b in buckets]
