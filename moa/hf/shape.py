"""Which model this is: its shape, a fingerprint of its weights, and whether a plan was made for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moa.devices import values_of
from moa.errors import ModelError, PlanError
from moa.plan import ELEMENT_BYTES, ModelShape, Plan

SAMPLES_PER_PARAMETER = 4096
NAMES_AND_VERSIONS = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, adapters in place; any other model as it is.

    Raises:
        ModelError: there is no transformers model.
    """
    inner = model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: model)()
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"wanted a transformers model, got {type(model).__name__}; load one with AutoModelForCausalLM.from_pretrained"
        )
    return inner


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the language model, also of a model that has other parts."""
    return model.config.get_text_config(decoder=True)


def model_shape(model: PreTrainedModel, name: str = "", revision: str = "") -> ModelShape:
    """The shape of a causal language model, with the fingerprint of its weights.

    Args:
        model: a transformers causal LM, weights loaded; may be in a PEFT wrapper.
        name: hub id or path it came from.
        revision: commit or tag.

    Raises:
        ModelError: the config lacks a size, has one per layer, or the dtype is none that a plan knows.
    """
    model = unwrapped(model)
    sizes = model_sizes(model, str(model.dtype).removeprefix("torch."))
    return sizes.model_copy(update={"fingerprint": fingerprint(model), "name": name, "revision": revision})


def model_sizes(model: PreTrainedModel, dtype: str) -> ModelShape:
    """The shape of a causal language model that may have no weights, as it will be in `dtype`; no fingerprint, no name.

    Raises:
        ModelError: as for `model_shape`.
    """
    config = text_config(model)
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", heads)
    if dtype not in ELEMENT_BYTES:
        raise ModelError(f"the model's dtype is {dtype}, wanted one of {', '.join(ELEMENT_BYTES)}")
    if heads % kv_heads:
        raise ModelError(f"{heads} query heads do not divide among {kv_heads} KV heads")
    return ModelShape(
        architecture=type(model).__name__,
        layers=_count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_count(config, "head_dim", _count(config, "hidden_size") // heads),
        dtype=dtype,  # type: ignore[arg-type]  # checked above
    )


def _count(config: PreTrainedConfig, field: str, default: int | None = None) -> int:
    try:
        value = getattr(config, field, None)
    except RuntimeError as error:  # a config whose layers differ in it
        raise ModelError(
            f"{type(config).__name__}.{field} differs between layers, which no plan can say: {error}"
        ) from None
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{type(config).__name__}.{field} is {value!r}, wanted one positive number for all layers; "
            "models whose layers differ in it are not supported"
        )
    return value


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the config and every weight's name, shape, dtype and an evenly strided sample of up to 4096 values.

    Weights are parameters and saved buffers, where some quantisers keep theirs; of a PEFT model, adapters too. Equal for
    every load of the same model in the same dtype, on any devices; offloaded weights are read one at a time. A training
    step changes it unless all it touched lies between the samples.

    Raises:
        ModelError: a parameter has no values (meta device, not offloaded).
    """
    model = unwrapped(model)
    digest = hashlib.sha256(json.dumps(_behaviour(model.config), sort_keys=True, default=str).encode())
    for name, held in sorted(_weights(model)):
        weight = values_of(model, name, held)
        digest.update(f"{name}\n{tuple(weight.shape)}\n{weight.dtype}\n".encode())
        for plain in _plain(weight.detach()):
            flat = plain.reshape(-1)
            sample = flat[:: -(-flat.numel() // SAMPLES_PER_PARAMETER) or 1]  # at most 4096 values
            digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that are saved with them; tied ones once, under the first of their names."""
    tied, seen = model.all_tied_weights_keys, set()
    for name, weight in model.named_parameters():
        shared = tied.get(name, name) if weight.is_meta else name  # offloaded, they are placeholders of their own
        if shared not in seen:
            seen.add(shared)
            yield name, weight
    buffers = dict(model.named_buffers())
    yield from ((name, buffers[name]) for name in model.state_dict() if name in buffers)


def _plain(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a weight: several for a quantised one (torchao), itself for any other."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _plain(getattr(weight, name))


def _behaviour(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config decides outputs: all that differs from its class's defaults, but for names and versions."""
    content: dict[str, Any] = config.to_diff_dict()
    return {k: v for k, v in content.items() if k not in NAMES_AND_VERSIONS and not k.startswith("_")}


def check_plan(model: PreTrainedModel, plan: Plan, *, allow_other_weights: bool = False) -> None:
    """Make sure that a plan was made for a model.

    Args:
        model: a transformers causal LM; may be in a PEFT wrapper.
        plan: the plan to run it under; an empty fingerprint (an imported plan) fits any weights.
        allow_other_weights: accept other weights of the same shape, such as a fine-tuned model's.

    Raises:
        PlanError: a size or the fingerprint differs; names the field, what was wanted and what was got.
        ModelError: the model has no shape that a plan could have.
    """
    shape = model_shape(model)
    for field in ("architecture", "layers", "heads", "kv_heads", "head_dim"):
        wanted, got = getattr(plan.model, field), getattr(shape, field)
        if wanted != got:
            raise PlanError(
                f"the plan is for another model: model.{field} is {wanted!r} in the plan, {got!r} in this model; "
                f"load {plan.model.name or 'the model it was made for'}, or make a plan for this one: moa compress"
            )
    if plan.model.fingerprint not in ("", shape.fingerprint) and not allow_other_weights:
        raise PlanError(
            f"the plan is for other weights: model.fingerprint is {plan.model.fingerprint[:16]} in the plan, "
            f"{shape.fingerprint[:16]} in this model (plan dtype {plan.model.dtype}, this model {shape.dtype}); "
            "load the same weights in the same dtype, or pass allow_other_weights for a fine-tuned model"
        )
