"""`moa lm-eval`: lm-eval's own command, with `--model moa` and the long-context tasks that ship."""

from __future__ import annotations

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--moa-help"]}


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command (run, ls, validate), with --model moa and moa's tasks in it."""
    from moa.eval.harness import run_lm_eval

    run_lm_eval(context.args)
