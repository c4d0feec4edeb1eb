"""Under which conditions serving is measured: lines for a page, and the same for JSON."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from moa.local_paths import typed_command
from moa.plan import Plan


def client_environment() -> dict[str, object]:
    """Machine, versions, date and command: what is known where a server is measured, of the machine that asks."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "device": f"CPU {known.get('cpu_name', platform.machine())}",
        "versions": {name: version(name) for name in ("moa", "torch", "transformers")},
        "python": platform.python_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": typed_command(),
    }


def environment(plan: Plan | None = None, dtype: str = "float32") -> dict[str, object]:
    """The same, and how a model runs on it."""
    told = "dense" if plan is None else plan.sha256
    return {**client_environment(), "threads": torch.get_num_threads(), "dtype": dtype, "plan": told}


def lines(told: dict[str, object]) -> tuple[str, ...]:
    """The environment as a page tells it."""
    versions = told["versions"]
    names = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else str(versions)
    software, date = f"{names}, Python {told['python']}", f"{told['date']}, `{told['command']}`"
    if "plan" not in told:
        return f"asked from {told['device']}; {software}; what the server runs on is not known", date
    plan = str(told["plan"])
    beside = () if plan == "dense" else (f"plan {plan[:12]} beside dense",)
    return f"{told['device']}, {told['threads']} threads, {told['dtype']}; {software}", *beside, date
