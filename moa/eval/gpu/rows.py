"""Results as rows of a CSV that is whole after every row, so that a run can be killed, and resumed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from moa.errors import InputError, UsageError
from moa.eval.csv_rows import csv_rows
from moa.files import write_atomic

# What became of a subject in a case. Only "ok" has times.
STATUS = ("ok", "wrong", "failed", "missing", "unsupported")


@dataclass(frozen=True, slots=True)
class Row:
    """One subject in one case: what it is, what became of it, and its numbers if it was measured.

    `mask` says what a subject computes: "same" as the case's plan, "dense", or "equal length" (one window for all
    heads, as long as the plan's mean span, no sinks). `error` is the worst row's relative error against float64.
    Useful work is that of the plan for "same", and of its own mask otherwise.
    """

    case: str
    kind: str
    heads: str
    plan: str
    published: bool
    tokens: int
    batch: int
    chunk: int
    prompts: int
    kv: str
    subject: str
    mask: str
    status: str
    reason: str = ""
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    turns: int | None = None
    launch: str = ""
    buffer_sets: int | None = None
    flops: float | None = None
    kv_bytes: float | None = None
    dense_flops: float | None = None
    dense_kv_bytes: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    of_matmul_ratio: float | None = None
    of_copy_ratio: float | None = None
    stored_kv_bytes: float | None = None
    error: float | None = None
    setup_s: float | None = None
    sm_mhz_before: float | None = None
    sm_mhz_after: float | None = None
    power_w_after: float | None = None
    temperature_c_after: float | None = None
    device: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Case and subject; a file has one row of each that counts, the last."""
        return self.case, self.subject


class RowFile:
    """Appends rows, each on disk before the next is measured.

    Args:
        path: the CSV; what it holds is kept, but for an unfinished last line.

    Raises:
        InputError: the file is not such a CSV.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path) if path.exists() else []
        self._reasons = {row.key: row.reason for row in self.rows}
        write_atomic(path, csv_rows(self.rows, Row))

    def add(self, row: Row) -> None:
        """Append one row."""
        self.rows.append(row)
        self._reasons[row.key] = row.reason
        with self.path.open("ab") as file:
            file.write(csv_rows([row], Row).split(b"\n", 1)[1])
            file.flush()
            os.fsync(file.fileno())

    def compact(self) -> None:
        """Keep the rows that count."""
        self.rows = list(latest(self.rows))
        write_atomic(self.path, csv_rows(self.rows, Row))

    def is_done(self, case: str, subject: str) -> bool:
        """Whether an earlier run has settled this."""
        return self.reason(case, subject) is not None

    def reason(self, case: str, subject: str) -> str | None:
        """The reason of the row that counts, None if there is no row."""
        return self._reasons.get((case, subject))

    def check_device(self, device: str) -> None:
        """Refuse to mix devices in one file.

        Raises:
            UsageError: rows of another device are there.
        """
        others = {row.device for row in self.rows} - {device}
        if others:
            raise UsageError(f"{self.path} holds figures of {min(others)!r}, this is {device!r}; name another folder")


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, without a last line that a killed run left unfinished.

    Raises:
        InputError: other columns, or a value that is none.
    """
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    reader = csv.DictReader(io.StringIO(whole))
    names = [field.name for field in fields(Row)]
    if whole and reader.fieldnames != names:
        raise InputError(f"{path}: columns of another version or no such file; name another folder")
    kinds = get_type_hints(Row)
    try:
        return [_row({name: _value(text, kinds[name]) for name, text in line.items()}) for line in reader]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: a line cannot be read: {error}") from None


def _row(values: dict[str, Any]) -> Row:
    return Row(**values)


def _value(text: str, kind: Any) -> object:
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if type(None) in options and text == "":
        return None
    if bool in options:
        return text == "True"
    return options[0](text)


def latest(rows: list[Row]) -> Iterator[Row]:
    """The row that counts of every case and subject, in the order of first appearance."""
    yield from {row.key: row for row in rows}.values()
