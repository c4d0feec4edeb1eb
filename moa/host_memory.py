"""How much of this machine's memory a process may still take: what its control groups leave, shared within its job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNKNOWN_BYTES = 1 << 62  # not Linux: nothing is refused
# Of cgroup v2 and of v1's memory controller: where groups lie, the limit, what is used, and which of it the kernel would
# give back (kubernetes counts the same cache as free).
V2 = ("", "memory.max", "memory.current", "inactive_file")
V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: its share of what the machine and its control groups have left.

    Processes that torchrun started on one machine are each told the same share, whatever they hold already.
    """
    left = min([_machine_bytes(root), *_group_bytes(root)])
    return left if left == UNKNOWN_BYTES else max(0, left) // local_processes()


def local_processes() -> int:
    """How many processes of this job run on this machine, by the variable that torchrun and accelerate set."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _machine_bytes(root: Path) -> int:
    text = _read(root / "proc/meminfo")
    kib = next((line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:")), None)
    return UNKNOWN_BYTES if kib is None else int(kib) * 1024


def _group_bytes(root: Path) -> Iterator[int]:
    """What is left in the process's group, and in every group around it, wherever there is a limit."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, place = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            yield from _left_within(root / "sys/fs/cgroup", place, V2 if number == "0" else V1)


def _left_within(top: Path, place: str, names: tuple[str, str, str, str]) -> Iterator[int]:
    """Of the group at `place` and those around it. In a container `place` is often the host's: `top` is then its own."""
    subfolder, limit_name, used_name, cache_name = names
    own = PurePosixPath(*(part for part in PurePosixPath(place).parts if part not in ("/", "..")))
    for group in (own, *own.parents):
        folder = top / subfolder / group
        limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
        if limit.isdecimal() and used.isdecimal():  # "max" is no limit
            cache = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
            yield int(limit) - int(used) + int(cache.get(cache_name, "0"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
