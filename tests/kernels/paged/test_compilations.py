"""No kernel is compiled again because a length, a position, a layer or a page table changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_lengths_compile_nothing_anew() -> None:
    """162 steps of 3 layers: attention compiles for the tiles of prefill, of decodes and of drafts, the planner for the
    latter two and one or two sequences, and what launches mixed steps once for each of its ways."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("compilations.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = {"attend_kernel": 3, "hybrid_kernel": 2, "merge_kernel": 2, "append_kernel": 1, "plan_kernel": 3}
    assert json.loads(done.stdout) == wanted
