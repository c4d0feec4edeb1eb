"""Reports on disk: `report.json`, `report.md` and pictures; and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from moa.errors import InputError
from moa.eval.labels import percent, result_label
from moa.eval.markdown import NOT_MEASURED, to_markdown
from moa.eval.records import MethodResult, Report
from moa.files import write_atomic
from moa.plan import Plan, explain

if TYPE_CHECKING:
    from rich.table import Table

MAX_REPORT_BYTES = 64 << 20


def write_report(
    report: Report, folder: Path, *, plan: Plan | None = None, span_lengths_tokens: Sequence[int] = ()
) -> tuple[Path, ...]:
    """Write `report.json`, `report.md` and the pictures there is data for, each file atomically.

    Args:
        report: what was found.
        folder: made if missing; files of the same names are replaced.
        plan: the plan whose spans are drawn.
        span_lengths_tokens: a heat map for each; the longest length evaluated when empty.

    Returns:
        The files written, `report.json` first.

    Raises:
        InputError, ResourceError: the folder cannot be written to.
    """
    files = {"report.json": to_json(report).encode()}
    pictures = draw(report, plan, span_lengths_tokens)
    files["report.md"] = to_markdown(report, list(pictures)).encode()
    for name, data in {**files, **pictures}.items():
        write_atomic(folder / name, data)
    return tuple(folder / name for name in (*files, *pictures))


def draw(report: Report, plan: Plan | None = None, span_lengths_tokens: Sequence[int] = ()) -> dict[str, bytes]:
    """Every picture there is data for, as PNG bytes by file name."""
    from moa.eval import figures  # here, so that reading a report loads no matplotlib

    pictures = {}
    if any(result.plan and result.recall for result in report.methods):
        pictures["accuracy.png"] = figures.accuracy_curves(report)
    if len(report.pareto) > 1:
        pictures["pareto.png"] = figures.pareto_picture(report.pareto)
    if plan is not None:
        for n in span_lengths_tokens or (max(report.conditions.lengths_tokens, default=4096),):
            pictures[f"spans-{n}.png"] = figures.span_heat_map(plan, n)
    return pictures


def to_json(report: Report) -> str:
    """The text of `report.json`."""
    return report.model_dump_json(indent=2) + "\n"


def load_report(path: str | Path) -> Report:
    """Read a `report.json`, or the one in a folder.

    Raises:
        InputError: the file is missing, too large, or not a report; names the field, what was wanted and what was got.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_REPORT_BYTES:
        raise InputError(f"{file}: larger than {MAX_REPORT_BYTES} bytes; no report is")
    return report_from_json(data, str(file))


def report_from_json(data: bytes, source: str) -> Report:
    """The report in a file's bytes; `source` names it in errors.

    Raises:
        InputError: it is none; names the field, what was wanted and what was got.
    """
    try:
        return Report.model_validate_json(data)
    except ValidationError as error:
        raise InputError(f"{source}: not a report: {explain(error, Report)}") from None


def terminal_table(report: Report) -> Table:
    """The report's summary for a terminal of 80 columns: accuracy per length and share of KV kept, dense first.

    Lengths at which only the dense model was measured are left to `report.md`.
    """
    from rich.table import Table

    lengths = sorted({r.length_tokens for result in report.methods or report.results for r in result.recall})
    longest = max(report.conditions.lengths_tokens, default=0)
    table = Table(title=report.title, caption=f"recall accuracy by length in tokens; KV kept at {longest:,} tokens")
    table.add_column("method", no_wrap=True)
    for heading in (*(f"{n:,}" for n in lengths), "KV kept"):
        table.add_column(heading, justify="right")
    followers = [result.method for result in report.results[1:]]
    for result, follower in zip(report.results, [*followers, None], strict=True):
        scores = [percent(r.overall.accuracy_ratio) if (r := result.recall_at(n)) else NOT_MEASURED for n in lengths]
        # a line where the method changes
        table.add_row(
            result_label(result), *scores, _kv_share(result, longest), end_section=follower not in (None, result.method)
        )
    return table


def _kv_share(result: MethodResult, length_tokens: int) -> str:
    share = result.plan.density_ratio(length_tokens) if result.plan else 1.0
    return NOT_MEASURED if share is None else percent(share)
