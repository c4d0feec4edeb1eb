"""Resumable stages: the result of each unit of work is a file named by a hash of everything that decides it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from moa.errors import UsageError
from moa.files import write_atomic

T = TypeVar("T")
log = logging.getLogger("moa")


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
    """An output folder with its finished units in `stages/`."""

    folder: Path
    progress: Progress = silent

    @classmethod
    def open(cls, folder: Path, *, resume: bool, overwrite: bool, progress: Progress = silent) -> Workspace:
        """Make the folder, or take over what an earlier run left.

        Raises:
            UsageError: both were asked for, or the folder holds files and neither was.
        """
        if resume and overwrite:
            raise UsageError("--resume keeps what is there and --overwrite deletes it; give one of them")
        held = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; name a folder")
        if held and not (resume or overwrite):
            raise UsageError(f"{folder} is not empty; --resume goes on from there, --overwrite starts anew")
        if overwrite and held and not {"stages", "moa.log", "config.json"} & {*held}:
            raise UsageError(
                f"{folder} holds files that moa did not make ({held[0]}, ...); --overwrite only replaces runs"
            )
        if overwrite:
            shutil.rmtree(folder / "stages", ignore_errors=True)
        workspace = cls(folder, progress)
        for leftover in folder.glob("**/.*.tmp"):
            leftover.unlink(missing_ok=True)  # a killed run's half-written file
        return workspace

    def unit(
        self,
        name: str,
        key: str,
        suffix: str,
        make: Callable[[], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """The unit's result: read if it was made before from the same inputs, else made and written whole."""
        path = self.folder / "stages" / f"{name}-{key}{suffix}"
        if path.exists():
            log.info("%s: taken from %s", name, path.name)
            return load(path)
        log.info("%s: started", name)
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        save(result, path)
        log.info("%s: done", name)
        # Read back, so that a resumed run and a straight one go on from the same bytes.
        return load(path)

    def json_unit(self, name: str, key: str, make: Callable[[], object]) -> object:
        """A unit whose result is JSON."""
        return self.unit(name, key, ".json", make, _save_json, lambda path: json.loads(path.read_text()))


def _save_json(content: object, path: Path) -> None:
    write_atomic(path, json.dumps(content).encode())
