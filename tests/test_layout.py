"""The root names are links into `moa/`, and shadow nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("profile", "optimize", "kernels", "eval")


@pytest.mark.parametrize("name", LINKED)
def test_linked_packages_have_no_init(name):
    assert (ROOT / "moa" / name).is_dir()
    assert not (ROOT / "moa" / name / "__init__.py").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git here: an sdist carries no root links")
def test_root_names_are_committed_links():
    command = ["git", "ls-files", "-s", "--", *LINKED]
    rows = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {(row.split()[0], row.split("\t")[1]) for row in rows} == {("120000", name) for name in LINKED}


@pytest.mark.parametrize("args", [("-c", "import cProfile; cProfile.Profile()"), ("-m", "cProfile", "-h")])
def test_stdlib_profile_survives_the_repo_root(args):
    subprocess.run([sys.executable, *args], cwd=ROOT, check=True, capture_output=True)


def test_profile_is_the_standard_library_one():
    code = "import profile, sysconfig; assert profile.__file__.startswith(sysconfig.get_paths()['stdlib']), profile"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))
