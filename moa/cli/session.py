"""A long command's run in its folder: locked, logged from first to last, its progress shown."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.cli.output import note
from moa.cli.progress import logging_to, showing, telling
from moa.errors import ResourceError, shortage

if TYPE_CHECKING:
    from moa.stages import Workspace

log = logging.getLogger("moa")


@contextmanager
def session(
    folder: Path, options: Mapping[str, object], *, resume: bool = False, overwrite: bool = False
) -> Iterator[Workspace]:
    """The workspace in `folder`, held against other runs.

    `options` are written into the log, and on a resumed run those that differ from the last run's are said. A run that is
    stopped says how to go on.

    Raises:
        UsageError: the folder cannot be used, or another run has it.
    """
    from moa.stages import LOG_NAME, Workspace

    with _saying_how_to_go_on(folder), showing() as progress, telling():
        workspace = Workspace.open(folder, resume=resume, overwrite=overwrite, progress=progress)
        with workspace, logging_to(folder / LOG_NAME):
            _log_start(options)
            if resume:
                _say_changes(folder, options)
            yield workspace
            log.info("finished")


@contextmanager
def _saying_how_to_go_on(folder: Path) -> Iterator[None]:
    """A line for a run that was stopped from outside, written when the progress bars are gone."""
    from moa.stages import Workspace

    try:
        yield
    except BaseException as error:
        if Workspace(folder).has_units and _can_go_on(error):
            note(f"moa: finished units are kept in {folder}; to go on, run the command again with --resume")
        raise


@contextmanager
def helping(folder: Path) -> Iterator[Workspace]:
    """The workspace of a process that works for another one's run: it writes units, and says nothing but its own errors."""
    from moa.stages import Workspace

    quiet = logging.NullHandler()
    log.addHandler(quiet)  # without any, Python itself would write warnings to stderr
    try:
        yield Workspace(folder)
    finally:
        log.removeHandler(quiet)


def save_options(folder: Path, options: Mapping[str, object]) -> None:
    """Write `config.yaml`, which `--config` reads and the next `--resume` compares with."""
    import yaml

    from moa.files import write_atomic
    from moa.stages import CONFIG_NAME

    write_atomic(folder / CONFIG_NAME, yaml.safe_dump(_given(options)).encode())


def _given(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _can_go_on(error: BaseException) -> bool:
    """Whether the work was stopped from outside, so that the same command can finish it."""
    return isinstance(error, KeyboardInterrupt | SystemExit | ResourceError) or shortage(error) is not None


def _log_start(options: Mapping[str, object]) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("moa", "torch", "transformers"))
    log.info("started: %s, Python %s on %s", versions, platform.python_version(), platform.platform())
    log.info("command: %s", " ".join(sys.argv))
    log.info("options: %s", ", ".join(f"{name}={value!r}" for name, value in _given(options).items()))


def _say_changes(folder: Path, options: Mapping[str, object]) -> None:
    """Name the options that differ from those of the run that is resumed."""
    from moa.stages import SHOWN

    before = _last_options(folder)
    if before is None:
        return
    now = _given(options)
    changes = [
        f"{name} {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in dict.fromkeys((*now, *before))
        if before.get(name) != now.get(name)
    ]
    if changes:
        log.info(
            "changed since the last run: %s; what does not depend on it is reused", ", ".join(changes), extra=SHOWN
        )


def _last_options(folder: Path) -> dict[str, Any] | None:
    import yaml

    from moa.stages import CONFIG_NAME

    try:
        content = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None  # stopped before it had loaded the model
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        log.warning("%s cannot be read, so changed options are not known: %s", folder / CONFIG_NAME, error)
        return None
    return content if isinstance(content, dict) else None
