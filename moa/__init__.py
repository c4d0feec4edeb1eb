"""moa: elastic attention spans for long-context language models.

The few verbs, loaded when first used: `import moa` itself imports neither torch nor a solver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moa.errors import MoaError
    from moa.hf.apply import Attachment, apply
    from moa.pipeline import compress
    from moa.plan import Plan, load_plan
    from moa.runner.async_engine import AsyncEngine
    from moa.runner.engine import Engine
    from moa.runner.request import SamplingParams
    from moa.runner.settings import EngineSettings
    from moa.settings import CompressSettings
    from moa.spans import ElasticRule
    from moa.stages import Workspace

_HOMES = {
    "AsyncEngine": "moa.runner.async_engine",
    "Attachment": "moa.hf.apply",
    "CompressSettings": "moa.settings",
    "ElasticRule": "moa.spans",
    "Engine": "moa.runner.engine",
    "EngineSettings": "moa.runner.settings",
    "MoaError": "moa.errors",
    "Plan": "moa.plan",
    "SamplingParams": "moa.runner.request",
    "Workspace": "moa.stages",
    "apply": "moa.hf.apply",
    "compress": "moa.pipeline",
    "load_plan": "moa.plan",
}

__all__ = [
    "AsyncEngine",
    "Attachment",
    "CompressSettings",
    "ElasticRule",
    "Engine",
    "EngineSettings",
    "MoaError",
    "Plan",
    "SamplingParams",
    "Workspace",
    "apply",
    "compress",
    "load_plan",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'moa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
