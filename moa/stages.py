"""Resumable stages: the result of each unit of work is a file named by a hash of everything that decides it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from moa.errors import InputError, UsageError
from moa.files import write_atomic

M = TypeVar("M")
T = TypeVar("T")
log = logging.getLogger("moa")

# What a run leaves in its folder.
STAGES_NAME, LOG_NAME, CONFIG_NAME = "stages", "moa.log", "config.yaml"
RESULT_PATTERNS = ("plan.json", "profile.safetensors", "report.json", "report.md", "*.png")
_UNIT = re.compile(r"[\w-]+-[0-9a-f]{16}\.(json|safetensors)")


class Progress(Protocol):
    """Hears how far a stage is."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""


def key_of(**inputs: object) -> str:
    """A digest of JSON-like inputs."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Workspace:
    """An output folder with its finished units in `stages/`, or in `units` where several runs share them."""

    folder: Path
    progress: Progress = silent
    units: Path | None = None

    @classmethod
    def open(cls, folder: Path, *, resume: bool, overwrite: bool, progress: Progress = silent) -> Workspace:
        """Make the folder, or take over what an earlier run left.

        Raises:
            UsageError: both were asked for, or the folder holds files and neither was.
        """
        if resume and overwrite:
            raise UsageError("--resume keeps what is there and --overwrite deletes it; give one of them")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = {p.name for p in folder.iterdir()}
        except FileExistsError:
            raise UsageError(f"{folder} is a file; name a folder") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(f"{folder}: cannot be used as a folder: {error.strerror}; name another place") from None
        if LOG_NAME in held and held <= {LOG_NAME, CONFIG_NAME}:
            held = set()  # a run that stopped before its first result: nothing to keep or to lose
        if held and not (resume or overwrite):
            raise UsageError(f"{folder} is not empty; --resume goes on from there, --overwrite starts anew")
        if held and not {STAGES_NAME, LOG_NAME} & held:
            raise UsageError(
                f"{folder} holds files that moa did not make ({min(held)}, ...); "
                "--resume and --overwrite only take over an earlier run"
            )
        if STAGES_NAME in held and not (folder / STAGES_NAME).is_dir():
            raise UsageError(f"{folder / STAGES_NAME} is a file; name another folder")
        if overwrite:
            _remove_results(folder)
        for place in (folder, folder / STAGES_NAME):
            for leftover in place.glob(".*.json.*.tmp"), place.glob(".*.safetensors.*.tmp"):
                _unlink(leftover)  # a killed run's half-written files
        return cls(folder, progress)

    def unit(
        self,
        name: str,
        key: str,
        suffix: str,
        make: Callable[[], M],
        save: Callable[[M, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """The unit's result: read if it was made before from the same inputs, else made and written whole."""
        path = (self.units or self.folder / STAGES_NAME) / f"{name}-{key}{suffix}"
        if path.exists():
            log.info("%s: taken from %s", name, path.name)
            return _read_back(path, load)
        log.info("%s: started", name)
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        save(result, path)
        log.info("%s: done", name)
        # Read back, so that a resumed run and a straight one go on from the same bytes.
        return _read_back(path, load)

    def json_unit(self, name: str, key: str, make: Callable[[], object], read: Callable[[object], T]) -> T:
        """A unit kept as the JSON that `make` gives; `read` makes the result of it, and raises on what it does not know."""

        def load(path: Path) -> T:
            return read(json.loads(path.read_text(encoding="utf-8")))

        # made and saved as JSON, read back as T
        return self.unit(name, key, ".json", make, _save_json, load)


def _remove_results(folder: Path) -> None:
    """Delete what runs wrote, and nothing else: no old result stands beside a new run that fails."""
    _unlink(path for path in (folder / STAGES_NAME).glob("*") if _UNIT.fullmatch(path.name))
    for pattern in RESULT_PATTERNS:
        _unlink(folder.glob(pattern))


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _read_back(path: Path, load: Callable[[Path], T]) -> T:
    try:
        return load(path)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(
            f"{path}: not a stage's result any more ({type(error).__name__}: {str(error)[:80]}); "
            "delete it and run again with --resume"
        ) from None


def _save_json(content: object, path: Path) -> None:
    write_atomic(path, json.dumps(content).encode())
