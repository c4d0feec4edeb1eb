"""What commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

import typer

from moa.errors import UsageError

# What a write gives whose reader, or whose terminal, is gone.
NOBODY_THERE = (errno.EPIPE, errno.EIO)


def emit(text: str) -> None:
    """Write one piece of the result."""
    typer.echo(text)


def emit_json(content: Mapping[str, object]) -> None:
    """Write the result as one JSON object."""
    typer.echo(json.dumps(content, indent=2))


def note(text: str) -> None:
    """Say something that is not the result: progress, a hint."""
    # not typer.echo: it may write past what sits in sys.stderr's place, such as a progress bar
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one place


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


@contextmanager
def outliving_stderr() -> Iterator[None]:
    """Let work go on when the terminal or the pipe behind stderr is gone: the log file has it all."""
    stream: Any = sys.stderr and _Outliving(sys.stderr)
    with redirect_stderr(stream):
        yield


class _Outliving:
    """A text stream that turns to /dev/null when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._turn_away(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._turn_away(error)

    def _turn_away(self, error: OSError) -> None:
        if error.errno not in NOBODY_THERE:
            raise error
        # the descriptor and not the object, for what the stream still holds and for writers outside Python
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_standard_streams() -> None:
    """Give closed standard streams /dev/null: else the next file opened takes their number, and their output."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - open as long as the process
