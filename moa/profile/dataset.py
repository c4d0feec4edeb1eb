"""Rows of a data set: where they come from, and which of them calibrate and which validate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa.errors import DataError, closest
from moa.profile.synthetic import SYNTHETIC

ROW_KEYS = ("prompt", "answer")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows `{"prompt": text, "answer": text}` of a JSON-lines file; "answer" may be missing.

    Raises:
        DataError: the file is missing or empty, or a line is not such a row; names file, line and key.
    """
    try:
        # split at line feeds alone: JSON strings may hold the other line ends that `splitlines` knows
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; --dataset takes a JSON-lines file or {SYNTHETIC!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f'{path}: no samples; wanted lines like {{"prompt": "...", "answer": "..."}}')
    return rows


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: wanted a JSON object, got {type(row).__name__}")
    for key, value in row.items():
        if key not in ROW_KEYS:
            raise DataError(f"{where}: unknown key {key!r}{closest(key, ROW_KEYS)}; known are {', '.join(ROW_KEYS)}")
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: {key!r} must be a text that is not empty, got {value!r:.60}")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which is no text")
    if "prompt" not in row:
        raise DataError(f"{where}: the key 'prompt' is missing")
    return row


def split_rows(rows: Sequence[dict[str, str]], source: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows for calibration and, a quarter of them, for validation: disjoint, and the same for every length and seed.

    Raises:
        DataError: there are not two different rows.
    """
    digests = {hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest(): row for row in rows}
    if len(digests) < 2:
        raise DataError(f"{source}: one sample cannot both calibrate and validate; give at least two different ones")
    ordered = [digests[key] for key in sorted(digests)]
    held_out = max(1, len(ordered) // 4)
    return ordered[held_out:], ordered[:held_out]
