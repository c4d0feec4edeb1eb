"""The files of a paired evaluation: Markdown with pictures, JSON, one page, and lm-eval's own results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.eval.paired.markdown import to_markdown
from moa.eval.paired.page import to_html
from moa.eval.paired.pictures import pictures
from moa.eval.paired.records import PairedReport
from moa.eval.paired.run import Outcome
from moa.eval.paired.view import View
from moa.files import write_atomic

REPORT_JSON, REPORT_MD, REPORT_HTML, RESULTS_FOLDER = "eval.json", "eval.md", "eval.html", "lm_eval"


def write_outcome(outcome: Outcome, folder: Path, *, log_samples: bool) -> PairedReport:
    """Write the report and, by variant, lm-eval's own results; the report that names the latter.

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
    write_report(report, folder)
    return report


def write_report(report: PairedReport, folder: Path) -> None:
    """Write `eval.json`, first, for it holds all that was measured, `eval.md` with its pictures, and `eval.html`.

    Raises:
        ResourceError, InputError: the files cannot be written.
    """
    write_atomic(folder / REPORT_JSON, json.dumps(to_json(report), indent=1, allow_nan=False).encode())
    view = View(report)
    drawn = list(pictures(view))
    for picture in drawn:
        write_atomic(folder / f"{picture.name}.png", picture.png)
    write_atomic(folder / REPORT_MD, to_markdown(view, drawn).encode())
    write_atomic(folder / REPORT_HTML, to_html(view, drawn).encode())


def to_json(report: PairedReport) -> dict[str, Any]:
    """The report with what is computed from it: differences, means over tasks, shares by depth, and problems."""
    view = View(report)
    computed = {
        "differences": [difference.model_dump(mode="json") for difference in report.differences],
        "means": list(_means(view)),
        "depths": list(_depths(view)),
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


def _means(view: View) -> Iterator[dict[str, Any]]:
    """Mean shares by variant and length, and how far they are from dense."""
    for length in view.lengths:
        for variant in view.report.variants:
            if mean := view.mean(variant, length):
                difference = view.mean_difference(variant, length)
                where = {"variant": variant.name, "length_tokens": length}
                yield where | asdict(mean) | {"difference": asdict(difference) if difference else None}


def _depths(view: View) -> Iterator[dict[str, Any]]:
    """Shares of equal parts of the text, from its start, with their numbers of samples, by variant, task and length."""
    for cell in view.with_depth:
        for variant in view.report.variants:
            found = view.by_depth(variant, [cell])
            shares = [{"mean": at[0], "samples": at[1]} if at else None for at in found]
            where = {"variant": variant.name, "task": cell[0], "length_tokens": cell[1], "metric": cell[2]}
            yield where | {"depths": shares}


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
