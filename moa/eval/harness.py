"""lm-eval with our model class and our tasks in it; lm-eval itself discovers no plug-ins."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from moa.errors import MoaError

MODEL = "moa"
TASKS_FOLDER = Path(__file__).parent / "tasks"
INSTALL = "pip install 'moa[eval]'"


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval, which is an optional dependency.

    Raises:
        MoaError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MoaError(f"lm-eval is not installed; run: {INSTALL}")


def register() -> None:
    """Make `--model moa` known to lm-eval in this process; repeating it changes nothing."""
    require_lm_eval()
    import lm_eval.models  # noqa: F401 - lm-eval makes its own known only as long as nobody else's is
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="moa.eval.lm:MoaLM")


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with our model and tasks beside its own.

    Args:
        arguments: the words after `lm-eval`.

    Raises:
        MoaError: lm-eval is not installed.
        SystemExit: from its parser.
    """
    register()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]  # it parses nothing else
    try:
        command = HarnessCLI()
        parsed = command.parse_args()
        _include_ours(parsed)
        command.execute(parsed)
    finally:
        sys.argv = before


def _include_ours(parsed: Namespace) -> None:
    """Put our folder before those that the user names, on the command line or in a --config file."""
    if not hasattr(parsed, "include_path"):
        return
    named = parsed.include_path
    if named is None and getattr(parsed, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig

        named = EvaluatorConfig.load_yaml_config(parsed.config).get("include_path")
    theirs = [named] if isinstance(named, str) else list(named or ())
    parsed.include_path = [str(TASKS_FOLDER), *theirs]
