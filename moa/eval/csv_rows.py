"""Frozen rows as CSV: a column for every field, floats to six digits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any


def csv_rows(rows: Iterable[Any], kind: type) -> bytes:
    """A heading and a line for each of `rows`, instances of the dataclass `kind`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()})
    return text.getvalue().encode()
