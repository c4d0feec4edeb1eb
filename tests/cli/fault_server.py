"""Not a test: runs `moa` command lines in forked processes and lets something go wrong at a chosen call.

Reads one JSON object a line from stdin: {"arguments": [...], "fault": null or {"what", "unit", "call", "count"}}, and
answers each with {"pid"} and then with {"code", "said"}: the exit code, negative for a signal, and what was written to
stderr. One process imports torch once for all runs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def fill_disk() -> None:
    """No file may grow any more: writes fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def take_memory() -> None:
    """The process gets no more than it has, so what comes next does not fit: torch's allocator says so."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE"), resource.RLIM_INFINITY))
    torch.empty(1 << 30)


def lose_stderr() -> None:
    """Nobody reads stderr any more."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)


FAULTS = {f.__name__: f for f in (lose_stderr, kill, terminate, interrupt, hang_up, fill_disk, take_memory)}


class Tripwire:
    """A profile function: does `what` at the `count`-th call of `call` inside the unit whose name begins with `unit`.

    Outside of units the unit is "". C functions count too, such as argmax.
    """

    def __init__(self, what: str, unit: str, call: str, count: int = 1) -> None:
        self.fault, self.unit, self.call, self.left = FAULTS[what], unit, call, count
        self.inside: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        unit = frame.f_code.co_qualname == "Workspace.unit"
        if event == "call" and unit:
            self.inside.append(frame.f_locals["name"])
        if event in ("call", "c_call"):
            name = frame.f_code.co_name if event == "call" else argument.__name__
            at = self.inside[-1] if self.inside else ""
            if name == self.call and at.startswith(self.unit) and bool(at) == bool(self.unit):
                self.left -= 1
                if self.left == 0:
                    sys.setprofile(None)
                    self.fault()
        if event == "return" and unit:
            self.inside.pop()


def run_forked(order: dict[str, Any], stderr: int) -> int:
    """Start the command in a session of its own; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for handle, number in ((null, 0), (null, 1), (stderr, 2)):
        os.dup2(handle, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore either, as nohup does
    from moa.cli.app import run

    code = 70
    try:
        if order.get("fault"):
            sys.setprofile(Tripwire(**order["fault"]))
        code = run(order["arguments"])
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        os._exit(code)


def reply(content: object) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def main() -> None:
    import torch  # noqa: F401 - what makes a run slow to start

    import moa.pipeline  # noqa: F401

    reply("ready")
    for line in sys.stdin:
        reader, writer = os.pipe()  # and not a file, for a full disk must not silence the run
        pid = run_forked(json.loads(line), writer)
        reply({"pid": pid})
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as stream:
            said = stream.read()
        _, status = os.waitpid(pid, 0)
        reply({"code": os.waitstatus_to_exitcode(status), "said": said})


if __name__ == "__main__":
    main()
