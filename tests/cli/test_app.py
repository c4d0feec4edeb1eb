"""Exceptions become one message and an exit code; nothing a user does wrong shows a traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moa.cli import app as cli
from moa.errors import DataError, InfeasibleError, MoaError, UsageError


class OutOfMemoryError(RuntimeError):
    """Looks like torch's."""

    __module__ = "torch"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MoaError("it broke"), 1, "moa: error: it broke"),
        (InfeasibleError("no plan"), 1, "moa: error: no plan"),
        (UsageError("cannot be meant"), 2, "moa: error: cannot be meant"),
        (typer.BadParameter("not that"), 2, "not that"),
        (DataError("no data"), 3, "moa: error: no data"),
        (MemoryError(), 4, "moa: error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 4, "moa: error: out/x: the disk is full"),
        (OutOfMemoryError("tried to allocate"), 4, "moa: error: the device is out of memory"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    assert cli.run([]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(errno.EIO, "I/O error"), ValueError("ours")])
def test_our_own_faults_are_not_hidden(monkeypatch, error):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(type(error)):
        cli.run([])


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["plan", "--help"], ["plan", "show", "--help"]])
def test_help(capsys, arguments):
    assert cli.run(arguments) == 0
    assert "Usage: moa" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["plan", "show"], ["plan", "show", "--length", "0", "x"], ["--no"]]
)
def test_usage_errors(capsys, arguments):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: moa" in err


def test_runs_as_a_module():
    command = [sys.executable, "-m", "moa", "plan", "show", "none.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("moa: error: none.json: no such file")
