"""Several processes of one job: the same results as one, and no waiting for the dead."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from moa.distributed import Team, environment, own_device
from moa.errors import UsageError
from moa.plan import load_plan
from moa.profile.artefact import Profile

HEAD = """
import json, os, sys, time
import numpy as np
from moa.distributed import joined
from moa.errors import DataError, MoaError
"""
# What the command line does with errors, in short.
TAIL = """
    except MoaError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


def processes(count: int, body: str) -> list[subprocess.Popen[str]]:
    """`count` processes that run `body` with their `team`, without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inner = "\n".join(f"            {line}" for line in body.strip().splitlines())
    code = f"{HEAD}\nif True:\n    try:\n        with joined(20) as team:\n{inner}\n{TAIL}"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(running: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        said = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(running, said, strict=True)]


@pytest.mark.slow
def test_all_have_what_each_made() -> None:
    """Seven texts among three processes, one of which has fewer; also nothing at all, and letters of several bytes."""
    body = """
texts = [f"é{i}" for i in range(7)]
mine = team.shard(texts)
back = team.gather(mine, lambda text: [text], lambda item: item[0])
none = team.gather(team.shard(texts[:1]), str, str)
values = np.full((2, 2), float(team.rank))
mean = team.mean(values, len(mine))
plan = team.from_leader(lambda: ("led", team.rank), list, tuple)
team.wait()
print(json.dumps([back, none, mean.tolist(), plan, team.suffix]))
"""
    found = ended(processes(3, body))
    assert [code for code, _, _ in found] == [0, 0, 0], found
    mean = (0 * 3 + 1 * 2 + 2 * 2) / 7
    for rank, (_, out, _) in enumerate(found):
        back, none, means, plan, suffix = json.loads(out)
        assert back == [f"é{i}" for i in range(7)]
        assert none == ["é0"]
        assert np.allclose(means, mean, rtol=1e-15)
        assert plan == ["led", 0]
        assert suffix == f"-{rank + 1}of3"


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_who_fails_says_so_and_ends_the_others(failing) -> None:
    body = f"""
if team.rank == {failing}:
    raise DataError("no good")
team.mean(np.zeros(3), 1)
"""
    found = ended(processes(2, body))
    assert [code for code, _, _ in found] == [3, 3], found
    assert found[failing][2].strip().endswith("no good")
    other = found[1 - failing][2].strip()
    # the leader's log needs the reason; the others have nothing to add to what the leader said
    assert other.endswith("process 1 of 2 stopped: no good" if failing == 1 else ""), other


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["os._exit(9)", "time.sleep(300)"])
def test_a_process_that_is_lost_ends_the_wait(loss) -> None:
    """Dead, or silent for longer than the limit."""
    body = f"""
team.wait()
if team.rank == 1:
    {loss}
team.wait()
"""
    body = body if "exit" in loss else body.replace("team.wait()\nif", "team.wait()\nprint('in', flush=True)\nif", 1)
    running = processes(2, body)
    out, err = running[0].communicate(timeout=100)
    for process in running:
        process.kill()
        process.wait()
    assert running[0].returncode == 4, (out, err)
    assert "another of the 2 processes of this job was lost, or did not answer within --peer-timeout-s" in err
    assert "run the same command again with --resume" in err
    for process in running:
        process.communicate()


def test_alone_nothing_is_exchanged() -> None:
    team = Team()
    assert (team.leads, team.suffix, team.shard([1, 2, 3])) == (True, "", [1, 2, 3])
    assert team.gather([1, 2], str, str) == (1, 2)
    values = np.array([0.1, 0.2])
    assert team.mean(values, 7) is values
    assert team.from_leader(lambda: "made", str, str) == "made"
    team.wait()


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_are_disjoint_and_whole(world) -> None:
    items = list(range(5))
    shares = [Team(rank, world).shard(items) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_has_a_gpu_of_its_own(monkeypatch) -> None:
    assert environment() == (0, 1)
    assert own_device("auto") == "auto"
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert environment() == (5, 8)
    assert own_device(None) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="process 1 of this machine has no GPU of its own, there are 1"):
        own_device("cuda")
    with pytest.raises(UsageError, match="--device-map auto with 8 processes: each would take all devices"):
        own_device("auto")


JOB = ["--lengths", "128,256", "--num-samples", "16", "--seed", "5"]


def compress(folder: Path, out: Path, *more: str, count: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    return [sys.executable, *launcher, "-m", "moa", "compress", str(folder), "-o", str(out), *JOB, *more]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = run(compress(tiny_folder, out, count=1))
    assert done.returncode == 0, done.stderr
    return out


def assert_same(out: Path, alone: Path) -> None:
    """The profile to 1e-6, the plan and its validation."""
    found, wanted = (Profile.load(place / "profile.safetensors") for place in (out, alone))
    assert found.calibration == wanted.calibration
    for a, b in zip(found.lengths, wanted.lengths, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-6, atol=1e-6 * b.losses.max())
    plan, same = load_plan(out), load_plan(alone)
    assert plan.rules == same.rules
    assert plan.lengths == same.lengths
    assert plan.validation.sparse_loss == pytest.approx(same.validation.sparse_loss, rel=1e-6)
    assert plan.validation.dense_loss == pytest.approx(same.validation.dense_loss, rel=1e-6)


@pytest.mark.slow
def test_two_processes_make_the_plan_of_one(tiny_folder: Path, tmp_path: Path, alone: Path) -> None:
    done = run(compress(tiny_folder, tmp_path / "out", "--json", count=2))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object: the others say nothing there
    assert result["sha256"] == load_plan(tmp_path / "out").sha256
    assert_same(tmp_path / "out", alone)
    shares = {path.name.rpartition("-")[0] for path in (tmp_path / "out/stages").glob("*of2-*")}
    assert {f"{name}-{n}of2" for name in ("answers-128", "profile-256", "validate") for n in (1, 2)} <= shares
    assert done.stderr.count("profile 256 tokens: 8/8") == 1


def child_of(launcher: int, rank: int) -> int:
    """The process id of one rank under torchrun."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank} under {launcher}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes through Linux's /proc")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_job_and_a_resumed_one_makes_the_same_plan(
    tiny_folder: Path, tmp_path: Path, alone: Path, lost
) -> None:
    out, said = tmp_path / "out", tmp_path / "stderr"
    with said.open("w") as errors:
        job = subprocess.Popen(
            compress(tiny_folder, out, count=2), env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=errors
        )
        limit = time.monotonic() + 200
        while "profile 128 tokens" not in said.read_text() and job.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        assert job.poll() is None, said.read_text()
        os.kill(child_of(job.pid, lost), signal.SIGKILL)
        assert job.wait(timeout=100) != 0
    assert not (out / "plan.json").exists()
    # by whichever comes first: the broken exchange, or torchrun's order to stop
    assert "was lost, or did not answer" in said.read_text() or "moa: terminated" in said.read_text()
    assert ("run the command again with --resume" in said.read_text()) >= (lost == 1)
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "stages").glob("answers-*")}
    assert kept
    done = run(compress(tiny_folder, out, "--resume", count=2))
    assert done.returncode == 0, done.stderr
    assert_same(out, alone)
    assert all((out / "stages" / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert "answers-128-1of2: reused" in done.stderr
