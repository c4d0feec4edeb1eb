"""The solver process: `python -m moa.optimize.worker` reads problems on stdin and answers on stdout.

A message is 8 bytes of length, then a `.npz` of plain arrays; nothing is pickled. End of input ends the process, so it
does not outlive its parent; on Linux not even in the middle of a solve, when the parent was killed.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import IO

import numpy as np
import numpy.typing as npt

PR_SET_PDEATHSIG = 1  # of prctl(2)
HEADER = struct.Struct("<Q")
Message = dict[str, npt.NDArray[np.generic]]


def send(stream: IO[bytes], message: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Write one message."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **message)
    stream.write(HEADER.pack(buffer.tell()) + buffer.getvalue())
    stream.flush()


def receive(stream: IO[bytes]) -> Message | None:
    """Read one message; None at the end of the stream, also in the middle of a message."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    body = stream.read(size)
    if len(body) < size:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return dict(arrays)


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Say that the solver is loaded, then answer problems until the input ends."""
    from moa.optimize.model import solve_model

    send(sink, {"status": np.array("ready")})
    while (problem := receive(source)) is not None:
        send(sink, _answer(solve_model, problem))


def _answer(solve_model: Callable[[Message], Message], problem: Message) -> Message:
    try:
        return solve_model(problem)
    except Exception as error:  # noqa: BLE001 - whatever the solver does is an answer, not the end of the process
        text = " ".join(str(error).split())[:200]
        return {"status": np.array(f"failed: {type(error).__name__}: {text}")}


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends, however that ends; elsewhere the end of input must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve on stdin and stdout; what libraries print goes to stderr instead of between the messages."""
    end_with_parent()
    warnings.simplefilter("ignore")  # the parent checks every answer; nobody reads this process's stderr
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(os.fdopen(0, "rb"), private)


if __name__ == "__main__":
    main()
