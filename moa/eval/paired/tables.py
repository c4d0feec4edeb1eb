"""The tables of a paired evaluation, as entries that text, pages and terminals write each in their way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moa.eval.labels import percent
from moa.eval.markdown import NOT_MEASURED
from moa.eval.paired.records import Difference, TaskScores, Variant
from moa.eval.paired.view import Cell, Mean, Tone, View, depth_bounds
from moa.units import human_bytes

MARKS: dict[Tone, str] = {"better": " ▲", "worse": " ▼", "": ""}
# More ways than this beside dense, and a table of all tasks has no room for intervals
MOST_WITH_INTERVALS = 2
DIFFERENCES = (
    "Differences are to dense on the same samples, with 95 % intervals: Newcombe's for paired shares (his method 10), in "
    "percentage points; Student's t for losses in nats. ▲ better and ▼ worse than dense: the interval leaves out 0. p: exact "
    "McNemar test where answers are right or wrong, else t test; not corrected for the number of tasks."
)
WON_LOST = "won / lost: samples with a better, and with a worse, score than dense."
MEANS = "Means over tasks weigh each task alike; their intervals follow from the tasks' own (Zou and Donner 2008)."
KV_BYTES = (
    "KV bytes of one sequence of the length: the keys and values that a way keeps, not what else it computes with."
)
MASKED = (
    "A way that is said to see a share only hides the other keys, and memory holds them all: accuracy only, no memory is "
    "saved."
)
DEPTHS = "Where in the text what is asked for begins; 0 % is its start. All samples of the tasks that say it, together."


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of a table.

    Args:
        text: what is shown; may hold names from outside, and is escaped by who writes it.
        value: what a table is sorted by, where text would sort wrongly.
        tone: better or worse than dense.
        anchor: of the part of a page that says more.
    """

    text: str
    value: float | None = None
    tone: Tone = ""
    anchor: str = ""

    @property
    def marked(self) -> str:
        """The text with a mark of its tone."""
        return self.text + MARKS[self.tone]


Row = Sequence[Entry]
NOTHING = Entry(NOT_MEASURED)


@dataclass(frozen=True, slots=True)
class Table:
    """A table: the first entry of each row names it, `foot` rows are not sorted, `anchor` is its place on a page."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Row]
    foot: Sequence[Row] = field(default=())
    anchor: str = ""


def glance(view: View) -> Table | None:
    """Mean share of every variant by length; None where no task has shares."""
    lengths = [n for n in view.lengths if view.shares(n)]
    if not lengths:
        return None
    rows = [
        [Entry(v.name), *(_mean(view.mean(v, n), view.mean_difference(v, n)) for n in lengths)]
        for v in view.report.variants
    ]
    return Table("Mean accuracy by length", ["", *map(length_label, lengths)], rows)


def kv_bytes(view: View) -> Table | None:
    """KV bytes of every variant by length; None where no variant says them."""
    lengths = [n for n in view.lengths if any(v.kv_at(n) for v in view.report.variants)]
    if not lengths:
        return None
    rows = [[Entry(v.name), *(kv_entry(v, n) for n in lengths)] for v in view.report.variants]
    return Table("KV bytes by length", ["", *map(length_label, lengths)], rows)


def overview(view: View, length: int | None) -> Table:
    """All tasks at one length: dense and every other variant, with differences where there is room for them."""
    wide = len(view.others) > MOST_WITH_INTERVALS
    parts = [[v.name] if wide else [v.name, "difference", "p"] for v in view.others]
    headings = ["", "samples", view.dense.name, *(part for group in parts for part in group)]
    rows = [[*_overview_row(view, cell, wide)] for cell in view.cells(length)]
    return Table(length_label(length), headings, rows, [*_mean_row(view, length, wide), *_kv_row(view, length, wide)])


def detail(view: View, cell: Cell) -> Table:
    """One task at one length: a row per variant, with all that is known of it."""
    has_bytes = view.has_kv_bytes and cell[1] is not None
    headings = ["", *(["KV bytes"] if has_bytes else []), "score", "difference", "p", "won / lost", "samples"]
    rows = [
        [Entry(v.name), *([kv_entry(v, cell[1])] if has_bytes else []), *_detail_row(view, v, cell)]
        for v in view.report.variants
    ]
    return Table(f"{task_label(cell)}, {length_label(cell[1])}", headings, rows, anchor=_anchor(view, cell))


def depths(view: View) -> Table | None:
    """Shares by depth of the evidence, a row per length and variant; None where no task says depths."""
    rows = [
        [Entry(length_label(length), length), Entry(variant.name), *map(_at_depth, found)]
        for length in view.lengths
        for variant in view.report.variants
        if any(found := view.by_depth(variant, [cell for cell in view.with_depth if cell[1] == length]))
    ]
    return Table("By depth of the evidence", ["", "", *depth_bounds()], rows) if rows else None


def notes(view: View, *, details: bool = True) -> list[str]:
    """What a reader of the tables must know, with or without those of `detail`."""
    found = []
    if view.others:
        found.append(f"{DIFFERENCES} {WON_LOST}" if details else DIFFERENCES)
    if any(len(view.shares(length)) > 1 for length in view.lengths):
        found.append(MEANS)
    if view.has_kv_bytes:
        found.append(KV_BYTES)
    if any(not variant.saves_memory for variant in view.report.variants):
        found.append(MASKED)
    return found


def length_label(length: int | None) -> str:
    """`4,096 tokens`."""
    return f"{length:,} tokens" if length else "texts of any length"


def task_label(cell: Cell) -> str:
    """A task's name, with its metric where that is not simply its score."""
    task, _, metric = cell
    return task if metric == "score" else f"{task} ({metric})"


def kv_entry(variant: Variant, length: int | None, *, brief: bool = False) -> Entry:
    """KV bytes that memory holds, and what share of the dense ones that is or, where keys are only hidden, is seen."""
    size = variant.kv_at(length)
    if size is None:
        return NOTHING
    held = size.kv_bytes if variant.saves_memory else size.dense_kv_bytes
    share = f" ({percent(size.ratio)})" if variant.saves_memory else f" (sees {percent(size.ratio)})"
    return Entry(human_bytes(held) + ("" if brief else share), held)


def _anchor(view: View, cell: Cell) -> str:
    return f"cell-{view.report.cells.index(cell)}"


def _overview_row(view: View, cell: Cell, wide: bool) -> Iterator[Entry]:
    dense = view.scores(view.dense, cell)
    yield Entry(task_label(cell), anchor=_anchor(view, cell))
    yield Entry(str(len(dense.samples)), len(dense.samples)) if dense else NOTHING
    yield _score(dense)
    for variant in view.others:
        found = view.difference(variant, cell)
        score = _score(view.scores(variant, cell), tone=view.tone(found) if wide else "")
        yield from [score] if wide else [score, _difference(view, found), _p_value(found)]


def _mean_row(view: View, length: int | None, wide: bool) -> Iterator[Row]:
    shares = len(view.shares(length))
    if shares < 2:
        return
    row = [Entry(f"mean of {shares} shares"), Entry(""), _mean(view.mean(view.dense, length))]
    for variant in view.others:
        mean, difference = view.mean(variant, length), view.mean_difference(variant, length)
        row += [_mean(mean, difference)] if wide else [_mean(mean), _mean_difference(difference), Entry("")]
    yield row


def _kv_row(view: View, length: int | None, wide: bool) -> Iterator[Row]:
    if any(variant.kv_at(length) for variant in view.report.variants):
        row = [Entry("KV bytes"), Entry(""), kv_entry(view.dense, length, brief=wide)]
        for variant in view.others:
            row += [kv_entry(variant, length, brief=wide), *([] if wide else [Entry(""), Entry("")])]
        yield row


def _detail_row(view: View, variant: Variant, cell: Cell) -> Iterator[Entry]:
    scores, found = view.scores(variant, cell), view.difference(variant, cell)
    yield _score(scores, interval=True)
    if variant is view.dense:
        yield from [Entry("")] * 3
    else:
        yield _difference(view, found)
        yield _p_value(found)
        yield Entry(f"{found.better} / {found.worse}", found.better - found.worse) if found else NOTHING
    yield Entry(str(len(scores.samples)), len(scores.samples)) if scores else NOTHING


def _score(scores: TaskScores | None, *, tone: Tone = "", interval: bool = False) -> Entry:
    if scores is None:
        return NOTHING
    text = f"{100 * scores.mean:.1f} %" if scores.bounded else f"{scores.mean:.4f}"
    if interval and scores.interval:
        text += " [{:.1f}, {:.1f}]".format(*(100 * bound for bound in scores.interval))
    return Entry(text, scores.mean, tone)


def _mean(mean: Mean | None, difference: Mean | None = None) -> Entry:
    if mean is None:
        return NOTHING
    return Entry(f"{100 * mean.value:.1f} %", mean.value, difference.tone if difference else "")


def _mean_difference(found: Mean | None) -> Entry:
    if found is None:
        return NOTHING
    return Entry(_signed(found.value, found.low, found.high, shares=True), found.value, found.tone)


def _difference(view: View, found: Difference | None) -> Entry:
    if found is None:
        return NOTHING
    text = _signed(found.difference, found.low, found.high, shares=found.interval == "newcombe")
    return Entry(text, found.difference, view.tone(found))


def _signed(value: float, low: float | None, high: float | None, *, shares: bool) -> str:
    scale, digits = (100, 1) if shares else (1, 4)
    text = f"{scale * value:+.{digits}f}"
    return text if low is None or high is None else f"{text} [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"


def _p_value(found: Difference | None) -> Entry:
    if found is None or found.p_value is None:
        return NOTHING
    return Entry(f"{found.p_value:.3f}" if found.p_value >= 0.001 else "< 0.001", found.p_value)


def _at_depth(found: tuple[float, int] | None) -> Entry:
    return Entry(f"{100 * found[0]:.0f} % of {found[1]}", found[0]) if found else NOTHING
