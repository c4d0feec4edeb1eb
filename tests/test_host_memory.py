"""A process may take what its container leaves, not what the machine has, and no more than its share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa.host_memory import UNKNOWN_BYTES, free_bytes

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712  # what v1 says where there is none


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def machine(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    """A machine with 10 GiB free, `/proc/self/cgroup` and files below `/sys/fs/cgroup`."""
    texts = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {10 * GIB >> 10} kB\n", "proc/self/cgroup": cgroup}
    for name, text in {**texts, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def v2(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    stat = f"anon 7\nactive_file 5\ninactive_file {cache}"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def v1(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, object]:
    stat = f"inactive_file 1\ntotal_inactive_file {cache}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"memory/{folder}{name}": text for name, text in files.items()}


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert free_bytes(machine(tmp_path, "0::/", {})) == 10 * GIB
    assert free_bytes(tmp_path / "none") == UNKNOWN_BYTES


@pytest.mark.parametrize(
    ("cgroup", "files", "want"),
    [
        ("0::/job", v2("job/", 4 * GIB, 3 * GIB), GIB),
        ("0::/job", v2("job/", 4 * GIB, 3 * GIB, cache=2 * GIB), 3 * GIB),
        ("0::/job", v2("job/", "max", 3 * GIB), 10 * GIB),
        ("0::/job", v2("job/", 40 * GIB, 3 * GIB), 10 * GIB),
        ("0::/job", v2("job/", 4 * GIB, 5 * GIB), 0),
        # a step within a job within a user's slice: the tightest of them
        ("0::/slice/job/step", v2("slice/job/", 6 * GIB, GIB) | v2("slice/job/step/", "max", GIB), 5 * GIB),
        # in a container: its own files lie at the top, and the path is the host's, or goes up out of it
        ("0::/", v2("", 2 * GIB, GIB), GIB),
        ("0::/../other", v2("", 2 * GIB, GIB), GIB),
        ("4:memory:/docker/abc\n1:cpu:/docker/abc\n0::/", v1("", 2 * GIB, GIB), GIB),
        ("4:cpu,memory:/job", v1("job/", 4 * GIB, 3 * GIB, cache=GIB), 2 * GIB),
        ("4:memory:/job", v1("job/", NO_LIMIT_V1, 3 * GIB) | v1("", NO_LIMIT_V1, 5 * GIB), 10 * GIB),
        # names of other controllers, with colons and spaces
        ("3:cpu:/a:b c\n1:name=systemd:/x\n0::/a:b", v2("a:b/", 2 * GIB, 0), 2 * GIB),
    ],
)
def test_a_control_group_s_limit_counts(tmp_path: Path, cgroup, files, want) -> None:
    assert free_bytes(machine(tmp_path, cgroup, files)) == want


def test_a_limit_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    files = {"job/memory.max": "", "job/memory.current": "?"}
    assert free_bytes(machine(tmp_path, "0::/job", files)) == 10 * GIB


def test_processes_of_one_job_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, "0::/job", v2("job/", 8 * GIB, 2 * GIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_bytes(tmp_path) == 2 * GIB
    assert free_bytes(tmp_path / "none") == UNKNOWN_BYTES


def test_this_machine_says_something() -> None:
    assert 0 < free_bytes() <= UNKNOWN_BYTES
