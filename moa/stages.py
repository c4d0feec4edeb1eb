"""Resumable stages: the result of each unit of work is a file named by a hash of everything that decides it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self, TypeVar

from moa.errors import DISK_FULL, InputError, ResourceError, UsageError, shortage
from moa.files import write_atomic
from moa.lock import LOCK_NAME, FolderLock, lock_folder

M = TypeVar("M")
T = TypeVar("T")
log = logging.getLogger("moa")
# Marks a log record that people should see at once, although it is no warning.
SHOWN = {"shown": True}

# What a run leaves in its folder.
STAGES_NAME, FRONT_NAME, LOG_NAME, CONFIG_NAME = "stages", "front", "moa.log", "config.yaml"
RESULT_PATTERNS = (
    "plan.json",
    "README.md",
    "profile.safetensors",
    "report.json",
    "report.md",
    "*.png",
    f"{FRONT_NAME}/plan-*.json",
    f"{FRONT_NAME}/front.csv",
    f"{FRONT_NAME}/front.png",
)
KEY_LENGTH = 16
_UNIT = re.compile(rf"[\w-]+-[0-9a-f]{{{KEY_LENGTH}}}\.(json|safetensors)")
# What an unfinished unit has so far.
_PART = re.compile(rf"[\w-]+-[0-9a-f]{{{KEY_LENGTH}}}\.part")

# What a killed `write_atomic` leaves of a file that runs write.
_LEFTOVER = re.compile(r"\..+\.(json|safetensors|yaml|md|png|csv|part)\.\w+\.tmp")


class Progress(Protocol):
    """Hears how far a stage is."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""


def key_of(**inputs: object) -> str:
    """A digest of JSON-like inputs."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, slots=True)
class Part:
    """What an unfinished unit has so far: one file, replaced as a whole, and gone when the unit is finished."""

    path: Path

    def save(self, data: bytes) -> None:
        """Put `data` in the place of what was kept before."""
        write_atomic(self.path, data)

    def load(self, read: Callable[[bytes], T]) -> T | None:
        """What was kept, None if nothing; `read` raises ValueError on what it does not know.

        Raises:
            InputError: it is damaged.
        """
        return _read_back(self.path, lambda path: read(path.read_bytes())) if self.path.exists() else None


@dataclass(frozen=True, slots=True)
class Workspace:
    """An output folder with its finished units in `stages/`, or in `units` where several runs share them.

    One that `open` gave keeps other processes out until it is closed or forgotten. `resumed` says on the way what of
    an earlier run is reused and what is done again.
    """

    folder: Path
    progress: Progress = silent
    units: Path | None = None
    lock: FolderLock | None = field(default=None, repr=False, compare=False)
    resumed: bool = False
    _said: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, *, resume: bool, overwrite: bool, progress: Progress = silent) -> Workspace:
        """Make the folder, or take over what an earlier run left.

        Raises:
            UsageError: both were asked for, or the folder holds files and neither was, or another process uses it.
        """
        if resume and overwrite:
            raise UsageError("--resume keeps what is there and --overwrite deletes it; give one of them")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            held = {p.name for p in folder.iterdir()} - {LOCK_NAME}
        except FileExistsError:
            raise UsageError(f"{folder} is a file; name a folder") from None
        except OSError as error:
            if error.errno in DISK_FULL:
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
        for place in (folder, folder / STAGES_NAME, folder / FRONT_NAME):
            _unlink(path for path in place.glob(".*.tmp") if _LEFTOVER.fullmatch(path.name))
        return cls(folder, progress, lock=lock, resumed=resume)

    def close(self) -> None:
        """Let other processes use the folder."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def has_units(self) -> bool:
        """Whether any unit is finished, or was begun and can be gone on with."""
        return any(_UNIT.fullmatch(path.name) or _PART.fullmatch(path.name) for path in self._place.glob("*"))

    @property
    def _place(self) -> Path:
        return self.units or self.folder / STAGES_NAME

    def part(self, name: str, key: str) -> Part:
        """Where the unit of that name and key keeps what it has so far; a unit of many steps uses it."""
        return Part(self._place / f"{name}-{key}.part")

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
        path = self._place / f"{name}-{key}{suffix}"
        if path.exists():
            log.info("%s: taken from %s", name, path.name)
            self._say(name, "reused")
            self._forget_parts(name)
            return _read_back(path, load)
        log.info("%s: started", name)
        self._say(name, self._why_made(name, key, suffix))
        self._forget_parts(name, but=key)
        with shortage_named(name):
            result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        save(result, path)
        self._forget_parts(name)
        log.info("%s: done", name)
        # Read back, so that a resumed run and a straight one go on from the same bytes.
        return _read_back(path, load)

    def _forget_parts(self, name: str, but: str = "") -> None:
        """No more than one unfinished unit of a name takes room on the disk."""
        parts = self._place.glob(f"{name}-{'?' * KEY_LENGTH}.part")
        _unlink(path for path in parts if path != self.part(name, but).path)

    def _why_made(self, name: str, key: str, suffix: str) -> str:
        if (name, "reused") in self._said or self.part(name, key).path.exists():
            return "reused in part, the rest is done now"
        others = any(_UNIT.fullmatch(path.name) for path in self._place.glob(f"{name}-{'?' * KEY_LENGTH}{suffix}"))
        return "done again, its inputs changed" if others else "done now"

    def _say(self, name: str, what: str) -> None:
        """Tell once for each name what becomes of an earlier run's work."""
        if self.resumed and (name, what) not in self._said:
            self._said.add((name, what))
            log.info("%s: %s", name, what, extra=SHOWN)

    def json_unit(self, name: str, key: str, make: Callable[[], object], read: Callable[[object], T]) -> T:
        """A unit kept as the JSON that `make` gives; `read` makes the result of it, and raises on what it does not know."""

        def load(path: Path) -> T:
            return read(json.loads(path.read_text(encoding="utf-8")))

        # made and saved as JSON, read back as T
        return self.unit(name, key, ".json", make, _save_json, load)


@contextmanager
def shortage_named(name: str) -> Iterator[None]:
    """Say in which unit or step something ran out."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        found = shortage(error)
        if found is None:
            raise
        raise ResourceError(f"{name}: {found}") from error


def _remove_results(folder: Path) -> None:
    """Delete what runs wrote, and nothing else: no old result stands beside a new run that fails."""
    units = (folder / STAGES_NAME).glob("*")
    _unlink(path for path in units if _UNIT.fullmatch(path.name) or _PART.fullmatch(path.name))
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
