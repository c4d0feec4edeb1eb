"""How a long command shows where it is: a bar on a terminal, a plain line now and then elsewhere, and a log file always."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moa.cli.output import note
from moa.errors import DISK_FULL, MoaError, UsageError

if TYPE_CHECKING:
    from moa.stages import Progress


@contextmanager
def showing() -> Iterator[Progress]:
    """A progress callback that draws on stderr."""
    if sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _line


def _line(stage: str, done: int, total: int) -> None:
    """Four lines a stage at most, so that a log of a long run stays short."""
    if done == total or done * 4 // total > (done - 1) * 4 // total:
        sys.stderr.write(f"{stage}: {done}/{total}\n")
        sys.stderr.flush()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield progress


class _Notes(logging.Handler):
    """Warnings, and what is marked to be shown, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and record.levelno < logging.ERROR:
            note(f"moa: warning: {record.getMessage()}")
        elif getattr(record, "shown", False):
            note(f"moa: {record.getMessage()}")


@contextmanager
def telling() -> Iterator[None]:
    """Say on stderr what moa's log warns of, or marks with `stages.SHOWN`."""
    logger, handler = logging.getLogger("moa"), _Notes()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _LogFile(logging.FileHandler):
    """A log that fails aloud: the usual one prints a traceback and goes on when the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # noqa: PLE0704  # called from inside an except block


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what moa logs to a file, with times."""
    logger = logging.getLogger("moa")
    level = logger.level
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UsageError(f"{path}: cannot be written as the log file: {error.strerror}; name another folder") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, Exception) and not isinstance(error, MoaError)
        with suppress(OSError):  # a log that cannot grow must not hide why the run stopped
            logger.error("stopped: %s: %s", type(error).__name__, error, exc_info=ours)
        raise
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
