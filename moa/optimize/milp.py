"""The MILP solved in a worker process that can be killed: the client side.

One worker serves many solves (loading cvxpy takes seconds). The parent keeps the time: a worker that answers too late
is killed, and the next solve starts a new one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

import moa
from moa.optimize.instance import BoolArray, Instance
from moa.optimize.problem import Float64Array
from moa.optimize.worker import Message, receive, send
from moa.spans import Int64Array

# HiGHS looks at its own clock only now and then: 10 s were seen to become 29 s. It is asked to end early, and killed
# when it is this much late.
OWN_LIMIT_SHARE = 0.9
GRACE_S = 1.0
# An answer is a rule for a head if its x sum to 1; HiGHS keeps rows to 1e-7.
CHOICE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class MilpAnswer:
    """How a MILP ended.

    Args:
        status: "optimal", "time_limit", "infeasible", "killed after 3.0 s" or "failed: ..."; "not started" where no time
            was left for it.
        picks: rule indices int64 [L, HKV], not yet checked; None without an answer.
        bound: lower bound on the cost over the columns that the solver was given, `-inf` if unknown.
    """

    status: str
    picks: Int64Array | None
    bound: float


class MilpWorker:
    """A solver process, started at the first solve and again after it was killed. Use as a context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The running process, if any."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            _close_quietly(stream)
        process.wait()

    def ask(self, message: Message, limit_s: float) -> Message:
        """Send one message and wait for its answer at most `limit_s` seconds.

        The wait includes starting the process (a second or more, as it loads cvxpy). A worker that is late, dead or did
        not start is gone afterwards, and the answer is only a `status` saying so.
        """
        started = time.monotonic()
        try:
            process, late = self._running(limit_s)
        except OSError as error:
            return _failed(f"the solver process did not start: {error}")
        if process is None:
            self.close()
            return _status(f"killed after {limit_s:.1f} s") if late else _failed("the solver process did not start")
        answer, late = _exchange(process, message, max(0.0, limit_s - (time.monotonic() - started)))
        if answer is not None:
            return answer
        self.close()
        return _status(f"killed after {limit_s:.1f} s") if late else _failed("the solver process died")

    def _running(self, limit_s: float) -> tuple[subprocess.Popen[bytes] | None, bool]:
        """The process, started if need be, and whether starting it took too long."""
        if self._process is not None and self._process.poll() is None:
            return self._process, False
        self.close()
        self._process = _start()
        ready, late = _exchange(self._process, None, limit_s)
        return (self._process if ready is not None else None), late


def solve_milp(
    instance: Instance, keep: BoolArray, worker: MilpWorker, *, rel_gap: float, abs_gap: float, time_limit_s: float
) -> MilpAnswer:
    """Solve an instance over the columns `keep` [L, HKV, R]; never raises for what the solver does.

    `rel_gap` is relative to the cost, `abs_gap` in units of cost; the first that is reached ends the search. The call
    takes at most `GRACE_S` longer than `time_limit_s`, starting the process included.
    """
    if time_limit_s <= 0:
        return MilpAnswer("not started", None, -np.inf)
    message = _message(instance, keep)
    for name, number in (("rel_gap", rel_gap), ("abs_gap", abs_gap), ("time_limit_s", OWN_LIMIT_SHARE * time_limit_s)):
        message[name] = np.array(number)
    return read_answer(worker.ask(message, time_limit_s + GRACE_S), keep)


def read_answer(answer: Message, keep: BoolArray) -> MilpAnswer:
    """What a worker's message says about the columns `keep` [L, HKV, R]; the picks are not yet checked for budgets."""
    status = {"user_limit": "time_limit", "infeasible_or_unbounded": "infeasible"}.get(
        str(answer["status"]), str(answer["status"])
    )
    if status not in ("optimal", "time_limit"):
        return MilpAnswer(status, None, -np.inf)
    x, bound = answer.get("x", np.zeros(0)), float(answer.get("bound", np.array(-np.inf)))
    picks = _picks(keep, np.asarray(x, dtype=np.float64))
    if picks is None and status == "optimal":  # it may end without an answer only for lack of time
        return MilpAnswer("failed: the answer does not give every head a rule", None, -np.inf)
    return MilpAnswer(status, picks, bound if np.isfinite(bound) else -np.inf)


def _message(instance: Instance, keep: BoolArray) -> Message:
    layer, head, rule = np.nonzero(keep)
    message: Message = {
        "cost": instance.cost[keep],
        "head": layer * keep.shape[1] + head,
        "rows": instance.rows[:, keep],
        "rhs": instance.rhs,
    }
    if instance.rule_limit is not None:
        pairs, link = np.unique(layer * keep.shape[2] + rule, return_inverse=True)
        message |= {"link": link, "layer": pairs // keep.shape[2], "rule_limit": np.array(instance.rule_limit)}
    return message


def _picks(keep: BoolArray, x: Float64Array) -> Int64Array | None:
    """The chosen rules [L, HKV]; None if some head has none, as when a solver out of time answers with zeros."""
    if x.shape != (int(keep.sum()),) or not np.isfinite(x).all():
        return None
    dense = np.zeros(keep.shape)
    dense[keep] = x
    if np.abs(dense.sum(axis=2) - 1).max() > CHOICE_TOLERANCE:
        return None
    return np.asarray(np.where(keep, dense, -1.0).argmax(axis=2), dtype=np.int64)


def _start() -> subprocess.Popen[bytes]:
    # The child must find this very moa, also where it is on sys.path by other means than an installation.
    home = str(Path(moa.__file__).resolve().parent.parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "moa.optimize.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def _exchange(process: subprocess.Popen[bytes], message: Message | None, limit_s: float) -> tuple[Message | None, bool]:
    """The answer, and whether the time ran out: a timer kills the process, which ends the blocking read."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, stop)
    timer.daemon = True
    timer.start()
    try:
        if process.stdin is None or process.stdout is None:
            return None, False
        if message is not None:
            send(process.stdin, message)
        return receive(process.stdout), late.is_set()
    except OSError:
        return None, late.is_set()
    finally:
        timer.cancel()


def _close_quietly(stream: IO[bytes] | None) -> None:
    if stream is None:
        return
    try:
        stream.close()
    except OSError:
        return  # unsent bytes for a process that is gone


def _status(text: str) -> Message:
    return {"status": np.array(text)}


def _failed(why: str) -> Message:
    return _status(f"failed: {why}")
