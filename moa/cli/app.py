"""The `moa` command: its commands, and the one place where an exception becomes a message and an exit code.

To add a command, write a module in this folder and register it below. Modules import Typer at the top and everything
heavy (pydantic, numpy, torch) inside their functions, so that `moa --help` stays under a second.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from moa.cli import compress, demo, plan
from moa.errors import MoaError, ResourceError

app = typer.Typer(
    name="moa",
    help="Compress the attention of a long-context language model, and run the compressed model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# A group:          app.add_typer(module.app, name="group")
# A single command: app.command("name")(module.function)
app.command("compress")(compress.compress)
app.command("estimate")(compress.estimate)
app.add_typer(plan.app, name="plan")
app.command("demo")(demo.demo)

INTERRUPTED = 130


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moa {version('moa')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Compress the attention of a long-context language model, and run the compressed model."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: see `moa.errors` for what each code means.

    Args:
        arguments: words after `moa`; None takes the process's own.
    """
    try:
        # Typer itself ends usage errors with 2 and an interrupt with 130.
        app(args=None if arguments is None else list(arguments), prog_name="moa")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if code == INTERRUPTED:
            typer.echo("moa: interrupted", err=True)
        return code
    except MoaError as error:
        return _fail(error)
    except KeyboardInterrupt:
        typer.echo("moa: interrupted", err=True)
        return INTERRUPTED
    except (MemoryError, OSError, RuntimeError) as error:
        shortage = _shortage(error)
        if shortage is None:
            raise
        return _fail(shortage)
    return 0


def _fail(error: MoaError) -> int:
    typer.echo(f"moa: error: {error}", err=True)
    return error.exit_code


def _shortage(error: Exception) -> ResourceError | None:
    """What ran out, or None where the exception means something else, which is a fault of ours."""
    if isinstance(error, MemoryError):
        return ResourceError("out of memory; try a shorter length, fewer samples or a smaller batch")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{where}the disk is full; free some room and run the command again")
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's CPU allocator
        return ResourceError("out of memory; try a shorter length, fewer samples or a smaller batch")
    # by name, because torch must not be imported for an error that is not its own
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return ResourceError(f"the device is out of memory; try a shorter length or a smaller batch ({error})")
    return None
