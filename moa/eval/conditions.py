"""Under which conditions numbers are taken: model, machine, versions, date, command."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moa
from moa.devices import compute_devices, input_device
from moa.eval.records import Conditions, Environment, RecallTask
from moa.hf.shape import fingerprint
from moa.local_paths import public_command, public_name
from moa.plan import ModelShape
from moa.stages import key_of


def environment(model: nn.Module) -> Environment:
    """Devices, dtype, threads and versions that `model` runs with now."""
    weight = next(model.parameters())
    devices = compute_devices(model) or {weight.device}
    return Environment(
        device=", ".join(_device_name(device) for device in sorted(devices, key=str)),
        dtype=str(weight.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        moa=_own_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        python=platform.python_version(),
    )


def conditions(
    model: PreTrainedModel,
    lengths_tokens: Sequence[int],
    *,
    name: str,
    task: RecallTask | None = None,
    command: str | None = None,
) -> Conditions:
    """The conditions of a report that begins now.

    Args:
        model: the model evaluated, weights loaded.
        lengths_tokens: every length evaluated.
        name: hub id or path of the model; of a path, only the last part is told.
        task: the recall questions asked.
        command: what was typed; this process's own arguments when None, without the places that they name.
    """
    return Conditions(
        model_name=public_name(name),
        model_fingerprint=fingerprint(model),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        environment=environment(model),
        task=task,
        lengths_tokens=tuple(lengths_tokens),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(public_command(sys.argv)) if command is None else command,
    )


def measured_as(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> dict[str, object]:
    """What decides a measurement beside its own inputs, for a unit's key; so figures of different code are never mixed."""
    return {
        "model": shape.fingerprint,
        "dtype": shape.dtype,
        "device": input_device(model).type,
        "threads": torch.get_num_threads(),
        "vocabulary": key_of(**tokenizer.get_vocab()),
        "versions": [version(name) for name in ("moa", "torch", "transformers")],
        "code": code_digest(),
    }


def code_digest() -> str:
    """SHA-256 of this very moa: its version stays the same between releases, and measurements are taken between them."""
    folder = Path(moa.__file__).parent
    files = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()})"


def _own_version() -> str:
    try:
        return version("moa")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "not installed"
