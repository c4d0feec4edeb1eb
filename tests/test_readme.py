"""What the first screen promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs_and_recalls_the_fact(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["42"]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = Path(__file__).resolve().parents[1] / "Makefile"
    targets = set(re.findall(r"^(\w+):", makefile.read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = set(re.findall(r"^    make (\w+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= commands <= targets
