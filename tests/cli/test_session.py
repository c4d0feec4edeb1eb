"""Whatever stops a run, nothing finished is lost, nothing half-written is left, and going on ends in the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from moa.lock import lock_folder
from moa.profile.sums import Sums

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--lengths", "64,128", "--validate-length", "160", "--num-samples", "2"]
RESULTS = ("plan.json", "README.md", "profile.safetensors")
# Where a unit can be hit: before it, while it works, with its file open and empty, and when the file is there.
STAGES = {
    "answers-128": ("_why_made", "argmax", "fdopen", "_read_back"),
    "profile-128": ("_why_made", "on_sample", "fdopen", "_read_back"),
    "optimize": ("_why_made", "receive", "fdopen", "_read_back"),
    "validate": ("_why_made", "answer_loss", "fdopen", "_read_back"),
    "": ("save", "fdopen", "_canonical"),
}

REUSED = ("answers-64", "answers-128", "profile-64", "profile-128", "optimize", "answers-160", "validate")
KEPT = "what does not depend on it is reused"


class Server:
    """Runs commands in processes that share one import of torch; see fault_server.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, 0
        assert json.loads(process.stdout.readline()) == "ready"

    def run(self, *arguments: object, fault: dict[str, Any] | None = None) -> tuple[int, list[str]]:
        """Exit code, and what the command said on stderr beside its progress."""
        order = {"arguments": [str(a) for a in arguments], "fault": fault}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        self.pid = json.loads(self.process.stdout.readline())["pid"]
        done = json.loads(self.process.stdout.readline())
        assert "Traceback" not in done["said"], done["said"]
        return done["code"], [line for line in done["said"].splitlines() if line.startswith("moa:")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, str(Path(__file__).with_name("fault_server.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        yield Server(process)


@pytest.fixture(scope="module")
def whole(server: Server, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert server.run("compress", tiny_folder, "-o", out, *OPTIONS)[0] == 0
    return out


def same_results(out: Path, whole: Path) -> bool:
    units = [sorted(path.name for path in (folder / "stages").iterdir()) for folder in (out, whole)]
    return units[0] == units[1] and all((out / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS)


def unit_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("stages/[!.]*") if path.suffix != ".part"}


def texts_kept(out: Path) -> dict[str, int]:
    """How many texts' work is kept of each unfinished unit."""
    parts = {path.name.rpartition("-")[0]: path.read_bytes() for path in out.glob("stages/[!.]*.part")}
    return {
        name: len(json.loads(data)) if name.startswith("answers") else Sums.from_bytes(data).texts
        for name, data in parts.items()
    }


def children_left(session: int) -> list[str]:
    """Command lines of the processes of a session that are still there after a while."""
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        left = [path for path in Path("/proc").glob("[0-9]*") if _session_of(path) == session]
        if not left:
            return []
        time.sleep(0.02)
    return [(path / "cmdline").read_text() for path in left]


def _session_of(process: Path) -> int:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # gone
        return -1
    return -1 if fields[0] == "Z" else int(fields[3])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(server, whole, tiny_folder, tmp_path, stage) -> None:
    """`kill -9` at each place of one stage in turn, every run going on where the one before was killed."""
    out, resume = tmp_path / "out", []
    for call in STAGES[stage]:
        before = unit_files(out)
        fault = {"what": "kill", "unit": stage, "call": call, "count": 2 if call == "receive" else 1}
        code, _ = server.run("compress", tiny_folder, "-o", out, *OPTIONS, *resume, fault=fault)
        assert code == -signal.SIGKILL, f"{call} was not reached in {stage or 'the end'}"
        assert children_left(server.pid) == []
        after = unit_files(out)
        assert before.items() <= after.items()
        assert all((whole / "stages" / name).read_bytes() == data for name, data in after.items())
        resume = ["--resume"]
    assert server.run("compress", tiny_folder, "-o", out, *OPTIONS, "--resume")[0] == 0
    assert same_results(out, whole)
    assert list(out.rglob(".*")) == []


def test_a_run_killed_within_a_stage_goes_on_within_it(server, tiny_folder, tmp_path) -> None:
    """No text that was done is done again, and the results are those of a run that nothing disturbed, to the byte."""
    options = [*OPTIONS[:-1], "5"]
    whole, out, resume = tmp_path / "whole", tmp_path / "out", []
    assert server.run("compress", tiny_folder, "-o", whole, *options)[0] == 0
    # (unit, call, which one, texts kept then): fdopen opens the file of the next text's work
    kills = [
        ("answers-64", "argmax", 3, {"answers-64": 2}),
        ("answers-64", "argmax", 1, {"answers-64": 2}),
        ("profile-128", "on_sample", 1, {"profile-128": 1}),
        ("profile-128", "fdopen", 2, {"profile-128": 2}),
        ("profile-128", "on_sample", 2, {"profile-128": 4}),
    ]
    for unit, call, count, kept in kills:
        fault = {"what": "kill", "unit": unit, "call": call, "count": count}
        code, _ = server.run("compress", tiny_folder, "-o", out, *options, *resume, fault=fault)
        assert code == -signal.SIGKILL, (unit, call)
        assert texts_kept(out) == kept
        resume = ["--resume"]
    code, said = server.run("compress", tiny_folder, "-o", out, *options, "--resume")
    assert code == 0
    assert "moa: profile-128: reused in part, the rest is done now" in said
    log = (out / "moa.log").read_text()
    for line in ("answers-64: 2 of 5", "profile-128: 1 of 5", "profile-128: 2 of 5", "profile-128: 4 of 5"):
        assert f"INFO {line} texts were done before\n" in log
    assert same_results(out, whole)
    assert list(out.rglob(".*")) == []


@pytest.mark.parametrize(
    ("what", "code", "last"),
    [
        ("interrupt", 130, "moa: interrupted"),
        ("terminate", 143, "moa: terminated"),
        ("hang_up", 129, "moa: stopped: the terminal is gone"),
        ("fill_disk", 4, "disk is full"),
        ("take_memory", 4, "out of memory; try a shorter length"),
    ],
)
def test_a_run_stopped_in_any_stage_says_so_and_goes_on(server, whole, tiny_folder, tmp_path, what, code, last) -> None:
    out, resume = tmp_path / "out", []
    for stage in ("answers-128", "profile-128", "optimize", "validate"):
        call = STAGES[stage][1]
        fault = {"what": what, "unit": stage, "call": call, "count": 2 if call == "receive" else 1}
        got, said = server.run("compress", tiny_folder, "-o", out, *OPTIONS, *resume, fault=fault)
        assert got == code, (stage, said)
        assert last in said[-1]
        assert f"moa: finished units are kept in {out}; to go on, run the command again with --resume" in said
        if what == "take_memory":
            assert said[-1].startswith(f"moa: error: {stage}: ")
        assert children_left(server.pid) == []
        assert not any(out.rglob(".*"))
        assert not (out / "plan.json").exists()
        if what != "fill_disk":
            assert "stopped: " in (out / "moa.log").read_text().splitlines()[-1]
        resume = ["--resume"]
    assert server.run("compress", tiny_folder, "-o", out, *OPTIONS, "--resume")[0] == 0
    assert same_results(out, whole)


def test_going_on_with_other_options_says_what_changed_and_what_is_reused(server, whole, tiny_folder, tmp_path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    changed = ["--resume", "--max-rules-per-layer", "1", "--dtype", "float32"]
    code, said = server.run("compress", tiny_folder, "-o", out, *OPTIONS, *changed)
    assert code == 0
    assert said == [
        f"moa: changed since the last run: max_rules_per_layer 4 -> 1, dtype auto -> float32; {KEPT}",
        "moa: answers-64: reused",
        "moa: answers-128: reused",
        "moa: profile-64: reused",
        "moa: profile-128: reused",
        "moa: optimize: done again, its inputs changed",
        "moa: answers-160: reused",
        "moa: validate: reused",  # the dense model's
        "moa: validate: reused in part, the rest is done now",
    ]
    assert (out / "plan.json").read_bytes() != (whole / "plan.json").read_bytes()
    code, said = server.run("compress", tiny_folder, "-o", out, *OPTIONS, "--resume")
    assert code == 0
    assert said[0].startswith("moa: changed since the last run: max_rules_per_layer 1 -> 4, dtype float32 -> auto; ")
    assert said[1:] == [f"moa: {line}: reused" for line in REUSED]
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS)
    code, said = server.run("compress", tiny_folder, "-o", out, *OPTIONS, "--resume", "--seed", "1")
    assert said[:2] == [
        f"moa: changed since the last run: seed 0 -> 1; {KEPT}",
        "moa: answers-64: done again, its inputs changed",
    ]
    assert not any("reused" in line for line in said[1:])


def test_the_log_holds_every_run_with_its_times_versions_and_options(server, whole, tiny_folder, tmp_path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    first = (out / "moa.log").read_text()
    fault = {"what": "terminate", "unit": "", "call": "save"}
    assert server.run("compress", tiny_folder, "-o", out, *OPTIONS, "--resume", fault=fault)[0] == 143
    log = (out / "moa.log").read_text()
    assert log.startswith(first)
    lines = log.removeprefix(first).splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|ERROR) ", line) for line in lines)
    assert f"started: moa {version('moa')}, torch {version('torch')}, transformers" in lines[0]
    assert "command: " in lines[1]
    assert f"options: model='{tiny_folder}', density=0.5, lengths='64,128', validate_length=160" in lines[2]
    assert "stopped: SystemExit: 143" in lines[-1]
    assert first.splitlines()[-1].endswith("INFO finished")


def test_a_second_run_in_the_folder_is_refused(server, whole, tiny_folder, tmp_path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lock = lock_folder(out)
    for flag in ("--resume", "--overwrite"):
        code, (said,) = server.run("compress", tiny_folder, "-o", out, *OPTIONS, flag)
        assert code == 2
        assert said.startswith(f"moa: error: {out} is in use by another run (process {os.getpid()} on ")
    lock.release()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", ["answers-64", "profile-64"])
def test_a_run_outlives_what_reads_its_stderr(server, whole, tiny_folder, tmp_path, stage) -> None:
    """As with `moa compress ... 2>&1 | head`, or a terminal that hangs up under `nohup`."""
    out = tmp_path / "out"
    fault = {"what": "lose_stderr", "unit": stage, "call": "_why_made"}
    code, _ = server.run("compress", tiny_folder, "-o", out, *OPTIONS, fault=fault)
    assert code == 0
    assert same_results(out, whole)
    assert (out / "moa.log").read_text().endswith("INFO finished\n")
