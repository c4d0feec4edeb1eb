"""What commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from moa.errors import UsageError


def emit(text: str) -> None:
    """Write one piece of the result."""
    typer.echo(text)


def emit_json(content: Mapping[str, object]) -> None:
    """Write the result as one JSON object."""
    typer.echo(json.dumps(content, indent=2))


def note(text: str) -> None:
    """Say something that is not the result: progress, a hint."""
    typer.echo(text, err=True)


def emit_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write aligned columns, numbers to the right; never wrapped, so that a pipe gets whole lines."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(headings))]
    for row in ([*headings], *cells):
        columns = zip(row, widths, numeric, strict=True)
        emit("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns).rstrip())


def require_free(path: Path, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        UsageError: the path exists and `--overwrite` was not given.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; name another place, or give --overwrite to replace it")
