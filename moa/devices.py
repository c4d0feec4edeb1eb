"""Where a model runs and where its weights lie, also when accelerate has spread it over devices or offloaded it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moa.errors import ModelError


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its tokens; `model.device` would be the meta device where the first layer is offloaded."""
    embedding = model.get_input_embeddings()
    device = next((hook.execution_device for hook in _hooks(embedding) if hook.execution_device is not None), None)
    return next(embedding.parameters()).device if device is None else _device(device)


def compute_devices(model: nn.Module) -> set[torch.device]:
    """The devices that layers run on: where their weights lie, or are brought to for each use."""
    held = {p.device for p in model.parameters() if not p.is_meta}
    brought = {hook.execution_device for module in model.modules() for hook in _hooks(module)} - {None}
    return held | {_device(device) for device in brought}


def values_of(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """A parameter or buffer with its values: itself, or what accelerate keeps of it while it is offloaded.

    Args:
        model: what `name` is looked up in.
        name: as in `named_parameters`.
        weight: what the model has under that name, any shape; on the meta device where it is offloaded.

    Returns:
        A tensor of the same shape and dtype; read from disk now where it lies there.

    Raises:
        ModelError: there are no values.
    """
    if not weight.is_meta:
        return weight
    parts = name.split(".")
    for i in reversed(range(len(parts))):  # its own module, then those around it
        for kept in _kept(model.get_submodule(".".join(parts[:i]))):
            try:
                return kept[".".join(parts[i:])].to(weight.dtype)
            except KeyError:
                continue
    raise ModelError(f"parameter {name} is on the meta device; load the weights before taking the fingerprint")


def _device(named: int | str | torch.device) -> torch.device:
    """A device as tensors name theirs: "cuda" is the current GPU."""
    device = torch.device("cuda", named) if isinstance(named, int) else torch.device(named)
    current = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if current else device


def _kept(module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """The offloaded weights that a module's hooks know, by their names within it."""
    yield from (hook.weights_map for hook in _hooks(module) if hook.weights_map is not None)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on a module that place it: one, or some of a chain."""
    hook = getattr(module, "_hf_hook", None)
    yield from (each for each in getattr(hook, "hooks", (hook,)) if hasattr(each, "weights_map"))
