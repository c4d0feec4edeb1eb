"""What ships: the wheel made from the sdist holds every file of `moa/` and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What .gitignore keeps out of a build, as far as it can lie under moa/.
IGNORED = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def _build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    built = _build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_wheel_from_sdist_holds_every_module(dist):
    (wheel,) = dist.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "moa").rglob("*") if path.is_file() and not IGNORED & {*path.parts})
    assert shipped == {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_carries_schema_types_marker_licence_and_command(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert {"moa/plan.schema.json", "moa/py.typed", f"{info}/licenses/LICENSE"} <= names
    assert "moa = moa.__main__:main" in commands


def test_sdist_holds_what_it_lists_and_no_root_links(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        top = {member.name.split("/")[1] for member in archive.getmembers() if "/" in member.name}
    assert {"moa", "tests", "recipes", "Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md"} <= top
    assert not top & {"profile", "optimize", "kernels", "eval"}
