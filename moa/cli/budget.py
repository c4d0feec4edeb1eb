"""The options that say how small the cache shall be: one of four at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa.errors import UsageError

if TYPE_CHECKING:
    from moa.plan import Budget

Density = Annotated[
    float | None, typer.Option(help="Share of the KV cache to keep, in (0, 1]. Default: 0.5 if no budget is given.")
]
KvBytesPerToken = Annotated[float | None, typer.Option(help="Or: bytes of keys and values per token of the text.")]
KvGib = Annotated[
    str | None, typer.Option(help="Or: GiB for so many sequences of a length, such as 4@131072x8.", metavar="GIB@NxS")
]
DecodeMs = Annotated[
    str | None,
    typer.Option(help="Or: ms for a decode step of so many sequences, such as 20@131072x8.", metavar="MS@NxS"),
]
Device = Annotated[
    str | None, typer.Option(help="GPU that --decode-ms is meant for: a10, a100, b200, h100, h200, l4, l40s.")
]
BUDGETS = ("density", "kv_bytes_per_token", "kv_gib", "decode_ms")
DEFAULT_DENSITY = 0.5


def with_budget(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the default density, if they have no budget."""
    if all(options.get(name) is None for name in BUDGETS):
        options["density"] = DEFAULT_DENSITY
    return options


def budget_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """`density` and `budget` of the settings.

    Raises:
        UsageError: more than one budget, or a device without `--decode-ms` or the other way round.
        InfeasibleError: no cache at all would be too slow.
    """
    given = [name for name in BUDGETS if options.get(name) is not None]
    if len(given) > 1:
        raise UsageError(f"give one budget, got {' and '.join(map(_flag, given))}")
    if (options.get("device") is None) == (given == ["decode_ms"]):
        raise UsageError("--decode-ms and --device go together: a time is a time on some device")
    if given == ["density"]:
        return {"density": options["density"]}
    budget = _budget(given[0], options)
    return {"density": budget.density_ratio, "budget": budget}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _budget(kind: str, options: Mapping[str, Any]) -> Budget:
    from moa import demo
    from moa.hf.size import model_size
    from moa.optimize.budget import decode_budget, kv_bytes_budget, kv_gib_budget
    from moa.optimize.roofline import Weights

    size = model_size(demo.resolve(options["model"]), str(options.get("dtype", "auto")))
    if kind == "kv_bytes_per_token":
        return kv_bytes_budget(options[kind], size.shape)
    if kind == "kv_gib":
        return kv_gib_budget(options[kind], size.shape)
    weights = Weights(size.parameters, size.weight_bytes)
    return decode_budget(options[kind], options["device"], size.shape, weights)
