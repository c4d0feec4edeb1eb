"""Workspaces take over only what is theirs, and units are read back, never half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moa.errors import InputError, UsageError
from moa.stages import Workspace, key_of

KEY = "0" * 16


def opened(folder: Path, **flags: bool) -> Workspace:
    return Workspace.open(folder, **{"resume": False, "overwrite": False, **flags})


def run_in(folder: Path) -> Workspace:
    """A folder as a finished run leaves it."""
    workspace = opened(folder)
    workspace.json_unit("a", KEY, lambda: [1], list)
    for name in ("plan.json", "profile.safetensors", "moa.log", "config.yaml"):
        (folder / name).write_text("old")
    return workspace


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    assert opened(tmp_path / "a/b").folder == tmp_path / "a/b"
    assert list((tmp_path / "a/b").iterdir()) == []
    opened(tmp_path / "a/b")


def test_a_folder_in_use_needs_a_word(tmp_path: Path) -> None:
    run_in(tmp_path)
    with pytest.raises(UsageError, match="not empty; --resume goes on from there, --overwrite starts anew"):
        opened(tmp_path)
    with pytest.raises(UsageError, match="give one of them"):
        opened(tmp_path, resume=True, overwrite=True)


def test_resume_keeps_and_overwrite_deletes(tmp_path: Path) -> None:
    run_in(tmp_path)
    opened(tmp_path, resume=True).json_unit("a", KEY, lambda: 1 / 0, list)
    assert (tmp_path / "plan.json").exists()
    workspace = opened(tmp_path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {".moa.lock", "moa.log", "config.yaml", "stages"}
    assert workspace.json_unit("a", KEY, lambda: [2], list) == [2]


def test_overwrite_deletes_only_what_runs_wrote(tmp_path: Path) -> None:
    run_in(tmp_path)
    others = [tmp_path / "main.tex", tmp_path / "stages" / "thesis.tex", tmp_path / "stages" / ".keep.tmp"]
    for path in others:
        path.write_text("mine")
    opened(tmp_path, overwrite=True)
    assert all(path.read_text() == "mine" for path in others)
    assert {p.name for p in (tmp_path / "stages").iterdir()} == {"thesis.tex", ".keep.tmp"}


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
@pytest.mark.parametrize("name", ["config.json", "plan.json", "thesis.tex", "stages"])
def test_foreign_files_are_left_alone(tmp_path: Path, flag, name) -> None:
    """A model folder holds a config.json too: taking it over would destroy the model."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=r"did not make|is a file"):
        opened(tmp_path, **{flag: True})
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_that_stopped_before_its_first_result_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("moa.log", "config.yaml"):
        (tmp_path / name).write_text("")
        opened(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below", "a" * 300])
def test_places_that_cannot_be_folders(tmp_path: Path, place) -> None:
    (tmp_path / "file").write_text("")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"name a folder|name another place"):
            opened(tmp_path / place, **flags)


def test_leftovers_of_killed_runs_go(tmp_path: Path) -> None:
    run_in(tmp_path)
    names = (".plan.json.x1.tmp", "stages/.a-0.json.x2.tmp", ".config.yaml.x3.tmp", ".README.md.x_4.tmp")
    front = (
        f"stages/.a-{KEY}.part.x9.tmp",
        "front/.plan-000.json.x5.tmp",
        "front/.front.csv.x6.tmp",
        "front/.front.png.x7.tmp",
        ".rows.csv.x8.tmp",
    )
    leftovers = [tmp_path / name for name in (*names, *front)]
    (tmp_path / "front").mkdir()
    for path in leftovers:
        path.write_text("half")
    opened(tmp_path, resume=True)
    assert not any(path.exists() for path in leftovers)


def test_units_are_made_once_and_read_back(tmp_path: Path) -> None:
    workspace, calls = opened(tmp_path), []

    def make() -> object:
        calls.append(1)
        return (1, (2.5, None))

    first = workspace.json_unit("name", "key", make, list)
    again = workspace.json_unit("name", "key", make, list)
    assert first == again == [1, [2.5, None]]  # what the file says, not what `make` returned
    assert len(calls) == 1
    workspace.json_unit("name", "other", make, list)
    assert len(calls) == 2
    assert {p.name for p in (tmp_path / "stages").iterdir()} == {"name-key.json", "name-other.json"}


def test_a_unit_that_fails_leaves_nothing(tmp_path: Path) -> None:
    workspace = opened(tmp_path)
    with pytest.raises(ZeroDivisionError):
        workspace.json_unit("name", "key", lambda: 1 / 0, list)
    with pytest.raises(TypeError):
        workspace.json_unit("name", "key", lambda: {1, 2}, list)
    workspace.close()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_part_is_kept_until_its_unit_is_finished(tmp_path: Path) -> None:
    workspace, place = opened(tmp_path), tmp_path / "stages"
    part = workspace.part("a", KEY)
    assert part.load(bytes) is None
    assert not workspace.has_units

    def make() -> object:
        part.save(b"one")
        part.save(b"two")
        assert [p.name for p in place.iterdir()] == [f"a-{KEY}.part"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workspace.json_unit("a", KEY, make, list)
    assert workspace.has_units
    workspace.close()
    workspace = opened(tmp_path, resume=True)
    assert workspace.part("a", KEY).load(bytes) == b"two"
    workspace.json_unit("a", KEY, lambda: [1], list)
    assert [p.name for p in place.iterdir()] == [f"a-{KEY}.json"]
    part.save(b"a run was killed between the unit and this")
    workspace.json_unit("a", KEY, lambda: 1 / 0, list)
    assert [p.name for p in place.iterdir()] == [f"a-{KEY}.json"]


def test_parts_of_other_inputs_take_no_room(tmp_path: Path) -> None:
    """Changed options would leave one file each, for ever."""
    workspace = opened(tmp_path)
    for key in ("1" * 16, "2" * 16):
        workspace.part("a", key).save(b"old")
    workspace.part("a-1of2", KEY).save(b"another unit's")
    workspace.part("a", KEY).save(b"own")

    def make() -> object:
        assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == [f"a-{KEY}.part", f"a-1of2-{KEY}.part"]
        return [1]

    workspace.json_unit("a", KEY, make, list)
    workspace.close()
    opened(tmp_path, overwrite=True)
    assert list((tmp_path / "stages").iterdir()) == []


def test_a_damaged_part_says_what_to_do(tmp_path: Path) -> None:
    part = opened(tmp_path).part("a", KEY)
    part.save(b"[1")
    with pytest.raises(InputError, match=rf"stages/a-{KEY}\.part: .*delete it and run again with --resume"):
        part.load(json.loads)


@pytest.mark.parametrize("content", ["", "[1", "{}", "null", "[" * 100_000, "\x00"])
def test_a_damaged_unit_says_what_to_do(tmp_path: Path, content) -> None:
    workspace = run_in(tmp_path)
    (tmp_path / f"stages/a-{KEY}.json").write_text(content)

    def read(found: object) -> list:
        if not isinstance(found, list):
            raise TypeError("wanted a list")
        return found

    with pytest.raises(InputError, match=rf"stages/a-{KEY}\.json: .*delete it and run again with --resume"):
        workspace.json_unit("a", KEY, lambda: [1], read)


def test_keys_depend_on_content_alone() -> None:
    assert key_of(a=1, b=[2, 3]) == key_of(b=(2, 3), a=1)
    assert key_of(a=1) != key_of(a="1")
    assert key_of(a=1) != key_of(b=1)
    assert key_of(path=Path("x")) == key_of(path="x")
    json.dumps(key_of(a=None))
