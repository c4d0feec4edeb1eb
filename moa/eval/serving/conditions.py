"""Under which conditions serving is measured: lines for a page, and the same for JSON."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from moa.local_paths import typed_command
from moa.plan import Plan


def environment(plan: Plan | None = None, dtype: str = "float32") -> dict[str, object]:
    """Machine, versions, plan, date and command."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "device": f"CPU {known.get('cpu_name', platform.machine())}",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "versions": {name: version(name) for name in ("moa", "torch", "transformers")},
        "python": platform.python_version(),
        "plan": "dense" if plan is None else plan.sha256,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": typed_command(),
    }


def lines(told: dict[str, object]) -> tuple[str, ...]:
    """The environment as a page tells it."""
    versions = told["versions"]
    names = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else str(versions)
    plan = str(told["plan"])
    return (
        f"{told['device']}, {told['threads']} threads, {told['dtype']}; {names}, Python {told['python']}",
        *(() if plan == "dense" else (f"plan {plan[:12]} beside dense",)),
        f"{told['date']}, `{told['command']}`",
    )
