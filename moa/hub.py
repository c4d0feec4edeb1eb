"""Share plans: push an output folder to a hub repository, pull one into a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa.errors import HubError, InputError, UsageError
from moa.eval.report import report_from_json
from moa.files import write_atomic
from moa.hub_files import check_repo_id, explaining, list_files, read_file
from moa.local_paths import places_in
from moa.plan import MAX_PLAN_BYTES, PLAN_NAME, Plan, read_limited
from moa.plan_card import CARD_NAME, plan_card
from moa.units import human_bytes

# What travels beside the plan, and how large it may be. Never stages, logs or settings: they name local paths.
COMPANIONS = {
    CARD_NAME: 1 << 20,
    "profile.safetensors": 256 << 20,
    "report.json": 64 << 20,
    "report.md": 16 << 20,
}
PICTURE = re.compile(r"\w[\w-]*\.png", re.ASCII)
# Of one picture, and of all: a report has one for each length and a few more.
MAX_PICTURE_BYTES, MAX_PICTURES, MAX_PICTURES_BYTES = 16 << 20, 64, 64 << 20


@dataclass(frozen=True, slots=True)
class Pulled:
    """What was written, the plan last, and the commit it is from."""

    plan: Plan
    commit: str
    files: tuple[Path, ...]


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Put a plan and what belongs to it into a hub repository, made if there is none, in one commit.

    Args:
        folder: what `moa compress` made; the card is written from the plan where it is missing.
        repo_id: organisation/name.
        private: make the repository a private one.

    Returns:
        The commit's address.

    Raises:
        PlanError: the folder holds no valid plan.
        InputError: a file in it is not what its name says, too large, or names a place on this machine.
        UsageError: that is no repository's name.
        HubError: nobody is logged in, the hub cannot be reached, or the repository is public and `private` was asked.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repo_id(repo_id)
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that moa compress made")
    contents = _contents(folder)
    api = HfApi()
    with explaining(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not list_files(repo_id).private:
        raise HubError(f"{repo_id} is there already and is public; make it private on the hub, or choose another name")
    operations = [CommitOperationAdd(name, data) for name, data in contents.items()]
    with explaining(repo_id):
        done = api.create_commit(repo_id, operations, commit_message="Add an attention plan made by moa")
    return str(done.commit_url)


def pull(repo_id: str, folder: str | Path, *, revision: str | None = None, overwrite: bool = False) -> Pulled:
    """Write a repository's plan, and what belongs to it, into a folder.

    All is downloaded and the plan is checked before the first file is written; the plan is written last.

    Raises:
        PlanError: the repository's plan is not a valid one.
        UsageError: that is no repository's name, or files are in the way and `overwrite` was not given.
        HubError: there is no such repository, it holds no plan, or more than runs write, or the hub cannot be reached.
    """
    folder, found = Path(folder), list_files(repo_id, revision)
    if PLAN_NAME not in found.names:
        raise HubError(f"{repo_id}: the repository holds no {PLAN_NAME}; it is not one that moa push made")
    names = _travelling(found.names)
    if len(_pictures(names)) > MAX_PICTURES:
        raise HubError(
            f"{repo_id}: it holds {len(_pictures(names))} pictures, wanted at most {MAX_PICTURES}; "
            "it is not one that moa push made"
        )
    for name in (*names, PLAN_NAME):
        if (folder / name).exists() and not overwrite:
            raise UsageError(f"{folder / name} exists; name another folder, or give --overwrite to replace it")
    data = read_file(repo_id, PLAN_NAME, found.commit, MAX_PLAN_BYTES)
    plan = Plan.from_json(data, f"{repo_id}/{PLAN_NAME}")
    contents = dict[str, bytes]()
    for name in names:
        contents[name] = read_file(repo_id, name, found.commit, _room(name, contents))
    for name, content in {**contents, PLAN_NAME: data}.items():
        write_atomic(folder / name, content)
    return Pulled(plan, found.commit, tuple(folder / name for name in (*contents, PLAN_NAME)))


def _contents(folder: Path) -> dict[str, bytes]:
    """The files that travel, by name; their bytes are those that were checked."""
    data = read_limited(folder / PLAN_NAME)
    plan = Plan.from_json(data, str(folder / PLAN_NAME))
    contents = {PLAN_NAME: data, CARD_NAME: plan_card(plan).encode()}
    names = _travelling(path.name for path in folder.iterdir() if path.is_file())
    if len(_pictures(names)) > MAX_PICTURES:
        raise InputError(f"{folder}: {len(_pictures(names))} pictures, at most {MAX_PICTURES} travel; move some away")
    for name in names:
        path, room = folder / name, _room(name, contents)
        if path.stat().st_size > room:
            raise InputError(
                f"{path}: larger than the {human_bytes(room)} there is room for; remove it from the folder"
            )
        contents[name] = path.read_bytes()
    for name, data in contents.items():
        _require_no_places(folder / name, data)
    return contents


def _require_no_places(path: Path, data: bytes) -> None:
    """Refuse a file that names a place on this machine: where models, data and homes lie is nobody else's business.

    Raises:
        InputError: it does, or it is not what its name says, so that nobody knows what it names.
    """
    for text in _texts_of(path, data):
        place = next(places_in(text), None)
        if place is not None:
            digest = ", and set its sha256 to an empty string" if path.name == PLAN_NAME else ""
            raise InputError(
                f"{path} names {place}, a place on this machine, which would go to others; "
                f"make it again with this moa, move it away, or write another name into it{digest}"
            )


def _texts_of(path: Path, data: bytes) -> Iterator[str]:
    """What a file says in words; pictures say none."""
    if path.suffix == ".md":
        yield data.decode(errors="replace")
    elif path.name == PLAN_NAME:
        yield from _strings(json.loads(data))
    elif path.suffix == ".json":
        yield from _strings(report_from_json(data, str(path)).model_dump(mode="json"))
    elif path.suffix == ".safetensors":
        yield from _header_of(path, data).values()


def _strings(content: object) -> Iterator[str]:
    """Every string in what JSON gives, keys as well."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        yield from content
        for value in content.values():
            yield from _strings(value)
    elif isinstance(content, Sequence):
        for value in content:
            yield from _strings(value)


def _header_of(path: Path, data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        InputError: it is none.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        return {str(name): str(text) for name, text in metadata.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a profile that moa compress made; move it away") from None


def _travelling(names: Iterable[str]) -> list[str]:
    """Those of some names that travel beside a plan, in a fixed order."""
    return sorted(name for name in names if name in COMPANIONS or PICTURE.fullmatch(name))


def _pictures(names: Iterable[str]) -> list[str]:
    return [name for name in names if PICTURE.fullmatch(name)]


def _room(name: str, contents: Mapping[str, bytes]) -> int:
    """How large a file that travels may be, beside those that do already."""
    if name in COMPANIONS:
        return COMPANIONS[name]
    taken = sum(len(contents[picture]) for picture in _pictures(contents))
    return min(MAX_PICTURE_BYTES, MAX_PICTURES_BYTES - taken)
