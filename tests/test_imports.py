"""Who imports whom, and what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moa"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Small things everybody may use.
COMMON = {"errors", "files", "local_paths", "units"}
PLAN = {"plan", "plan_records", "plan_reading", "hub_files", "plan_report", "plan_import", "model_config"}
CORE = {"spans", "kernels"} | PLAN
EVERYTHING_BUT_CLI = CORE | {
    "profile",
    "optimize",
    "hf",
    "integrations",
    "runner",
    "devices",
    "host_memory",
    "process_memory",
    "simulate",
    "eval",
    "demo",
    "lock",
    "stages",
    "plan_card",
    "hub",
    "dry_run",
    "settings",
    "calibration",
    "distributed",
    "planning",
    "pipeline",
    "estimate",
}
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "units": set(),
    "local_paths": set(),
    "spans": set(),
    "hub_files": set(),
    "plan_records": {"spans"},
    "plan_reading": set(),
    "plan": {"spans", "hub_files", "plan_records", "plan_reading"},
    "plan_report": {"spans", "plan"},
    "plan_import": {"spans", "plan", "model_config"},
    "model_config": {"plan"},
    "kernels": {"spans"},
    "devices": set(),
    "host_memory": set(),
    "process_memory": set(),
    "profile": CORE | {"devices", "host_memory", "demo"},  # the demo's language is one of the calibration data sets
    "optimize": CORE,
    "hf": CORE | {"devices"},
    "integrations": CORE | {"hf"},
    # Which models can run, and which layer an attention module is, is known to the wrapper; the runner runs those.
    "runner": CORE | {"hf", "devices", "host_memory"},
    "simulate": CORE | {"runner"},
    "demo": EVERYTHING_BUT_CLI,  # its job is the whole line; its language stands alone
    "eval": EVERYTHING_BUT_CLI,
    "lock": set(),
    "stages": {"lock"},
    "settings": {"profile", "optimize", "plan", "spans"},
    "distributed": set(),
    "calibration": CORE | {"profile", "settings", "stages"},
    "planning": EVERYTHING_BUT_CLI,
    "pipeline": EVERYTHING_BUT_CLI,
    "estimate": EVERYTHING_BUT_CLI,
    "plan_card": PLAN | {"eval"},  # its tables
    "hub": PLAN | {"plan_card", "eval"},
    "dry_run": EVERYTHING_BUT_CLI,
    "cli": EVERYTHING_BUT_CLI,
    "__init__": EVERYTHING_BUT_CLI,
    "__main__": {"cli"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of `moa` a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import on line {node.lineno}; write moa.…"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = {name.split(".")[1] for name in names if name.startswith("moa.")}
    return {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_part_may(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: say in tests/test_imports.py what it may import"
    assert imported_parts(path) <= MAY_IMPORT[part] | COMMON | {part}


# What the simulator shares with the runner: who is next, what memory and steps cost; no tensors.
TORCHLESS = ("moa.runner.policies", "moa.runner.account", "moa.runner.scheduler", "moa.runner.cost_model")


def test_simulate_takes_only_policies_from_the_runner():
    for path in (PACKAGE / "simulate").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moa.runner"):
                assert node.module.startswith(TORCHLESS), f"{path}:{node.lineno} imports {node.module}"


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1, "importing printed something"
    return set(json.loads(done.stdout))


def test_import_moa_pulls_nothing_heavy():
    loaded = modules_after("import moa")
    assert not loaded & {"triton", "cvxpy", "highspy", "matplotlib", "lm_eval", "datasets"}


def test_scheduling_sees_no_tensors():
    assert "torch" not in modules_after(f"import {', '.join(TORCHLESS)}")


def test_the_command_line_starts_light():
    loaded = modules_after("import moa.cli.app")
    assert not loaded & {"torch", "transformers", "numpy", "pydantic", "cvxpy", "matplotlib"}
