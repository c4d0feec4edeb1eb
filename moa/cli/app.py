"""The `moa` command: its commands, and the one place where an exception becomes a message and an exit code.

To add a command, write a module in this folder and register it below. Modules import Typer at the top and everything
heavy (pydantic, numpy, torch) inside their functions, so that `moa --help` stays under a second.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import Annotated

import typer

from moa.cli import bench, bench_serving, compress, demo, evaluate, hub, lm_eval, plan, serve
from moa.cli.output import note, outliving_stderr
from moa.errors import MoaError, shortage

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
bench.app.command("serve")(bench_serving.serve)
bench.app.command("throughput")(bench_serving.throughput)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")
app.command("serve")(serve.serve)
app.command("push")(hub.push)
app.command("pull")(hub.pull)
app.command("demo")(demo.demo)
app.command("lm-eval", context_settings=lm_eval.PASS_ON, add_help_option=False)(lm_eval.lm_eval)

# Exit codes of a command that was told to stop: 128 and the signal's number.
STOPPED = {130: "interrupted", 143: "terminated", 129: "stopped: the terminal is gone"}


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
    with outliving_stderr(), _signals_stop():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        # Typer itself ends usage errors with 2 and an interrupt with 130.
        app(args=None if arguments is None else list(arguments), prog_name="moa")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if code in STOPPED:
            note(f"moa: {STOPPED[code]}")
        return code
    except MoaError as error:
        return _fail(error)
    except KeyboardInterrupt:
        note(f"moa: {STOPPED[130]}")
        return 130
    except (MemoryError, OSError, RuntimeError) as error:
        found = shortage(error)
        if found is None:
            raise
        return _fail(found)
    return 0


def _fail(error: MoaError) -> int:
    rank = os.environ.get("RANK", "0")  # which of several processes this is, by their launcher
    note(f"moa: {'' if rank == '0' else f'process {rank}: '}error: {error}")
    return error.exit_code


@contextmanager
def _signals_stop() -> Iterator[None]:
    """SIGTERM, and SIGHUP where nobody asked to ignore it, end a command as an interrupt does, with all that is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
