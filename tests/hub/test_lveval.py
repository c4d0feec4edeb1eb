"""LV-Eval's data from the hub: fetched once, by prefetch, and used offline where there is no network."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY, TASK = "Infinigence/LVEval", "moa_lveval_factrecall_en_16k"


def published(texts: int) -> bytes:
    row = {"input": "the code of bahul is", "context": "the code of bahul is 42 .", "answers": ["42"]}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("factrecall_en/factrecall_en_16k.jsonl", "\n".join([json.dumps(row)] * texts))
    return archive.getvalue()


@pytest.mark.slow
def test_prefetched_it_needs_no_network(
    hub, moa, environment: dict[str, str], tiny_folder: Path, tmp_path: Path, without_network: list[str]
) -> None:
    hub.repos[REPOSITORY] = {"factrecall_en.zip": published(3)}
    code, told, said = moa("eval", "prefetch", tiny_folder, "--tasks", TASK)
    assert (code, told) == (0, f"1 tasks with 3 samples are here: {TASK}\n"), said
    command = [*without_network, sys.executable, "-m", "moa", "eval", str(tiny_folder), "--tasks", TASK, "--offline"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [(found["task"], len(found["samples"])) for found in report["scores"]] == [(TASK, 3)]
