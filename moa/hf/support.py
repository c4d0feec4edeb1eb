"""Which models can run under a plan, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from moa.errors import ModelError
from moa.hf.shape import text_config, unwrapped

KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")


def check_model(model: PreTrainedModel) -> None:
    """Make sure that a model's attention can be replaced and its KV cache may drop tokens.

    Raises:
        ModelError: names what stands in the way.
    """
    model = unwrapped(model)
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; plans are for decoders alone")
    if config is not model.config:
        raise ModelError(
            f"{type(model).__name__} holds a language model and more; load the language model alone{_text_class(config)}"
        )
    try:
        reason = _interface(model) or _rotary(config) or _kind(config) or _modules(model)
    except RuntimeError as error:  # a config whose layers differ in what was asked
        reason = f"its layers differ in what a plan has one of: {error}"
    if reason:
        raise ModelError(f"{type(model).__name__} cannot run under a plan: {reason}")


def _text_class(config: PreTrainedConfig) -> str:
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING  # a lazy mapping without types
    return f", with {known[type(config)].__name__}.from_pretrained" if type(config) in known else ""


def _interface(model: PreTrainedModel) -> str | None:
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface, so it cannot be replaced"
    return None


def _rotary(config: PreTrainedConfig) -> str | None:
    for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if "dynamic" in kind or kind == "longrope":
            return f"its rotary scheme {kind!r} rescales the positions of past keys as the text grows"
    return None


def _rope_types(parameters: Mapping[str, Any]) -> Iterable[str]:
    """Rotary types of a config; parameters may be nested, one set per layer type."""
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif key in ("rope_type", "type") and isinstance(value, str):
            yield value


def _kind(config: PreTrainedConfig) -> str | None:
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention caches no keys and values per head"
    odd = sorted({t for t in getattr(config, "layer_types", None) or () if t not in KNOWN_LAYER_TYPES})
    if odd:
        return f"it has layers of type {', '.join(odd)}, which are not softmax attention over all past tokens"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers share another layer's keys and values"
    if getattr(config, "is_causal", True) is False:
        return "its attention is not causal"
    return None


def _modules(model: PreTrainedModel) -> str | None:
    found = _by_layer(model)
    if crossed := sorted(layer for layer, modules in found.items() if len(modules) > 1):
        names = " and ".join(type(module).__name__ for module in found[crossed[0]])
        return f"layer {crossed[0]} has more than one attention ({names})"
    if sorted(found) != list(range(layers := text_config(model).num_hidden_layers)):
        return f"it has attention in layers {sorted(found)}, wanted all {layers}"
    if any(getattr(modules[0], "is_causal", True) is False for modules in found.values()):
        return "its attention is not causal; a BERT-like model is a decoder only with config.is_decoder=True"
    return None


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention modules by layer index, of a model that `check_model` passed."""
    return {layer: modules[0] for layer, modules in _by_layer(model).items()}


def _by_layer(model: PreTrainedModel) -> dict[int, list[nn.Module]]:
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
            found.setdefault(index, []).append(module)
    return found


def native_window(config: PreTrainedConfig) -> int | None:
    """The model's own sliding window in tokens, of layers that have one; None where none has."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if window is None or getattr(config, "use_sliding_window", True) is not False else None


def native_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The model's own sliding window per layer in tokens, None where a layer sees everything."""
    window = native_window(config)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)
