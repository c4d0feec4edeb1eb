"""The attention function `moa`, registered with transformers, and the padding mask it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from moa.errors import ModelError
from moa.hf.cache import LAYER_TAG, MoaLayer, Rows, Step
from moa.hf.support import native_window
from moa.kernels.dispatch import attend
from moa.kernels.memory import KVMemory

NAME = "moa"


@dataclass(frozen=True, slots=True)
class Binding:
    """What the attention module of a layer needs to know: its index, its own window, and empty memory under the plan."""

    layer: int
    native_window: int | None
    template: KVMemory


# Filled by apply() and emptied by detach(); weak, so that a model that is simply dropped leaves nothing behind.
_bindings: WeakKeyDictionary[nn.Module, Binding] = WeakKeyDictionary()


def register() -> None:
    """Make the name `moa` known to transformers; repeating it changes nothing."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def attention_function(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """`moa_attention`, which graphs of torch.compile break off for: what it computes depends on what spans have dropped."""
    if torch.compiler.is_compiling():
        outside: tuple[torch.Tensor, None] = torch.compiler.disable(moa_attention)(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no types here
        return outside
    return moa_attention(*args, **kwargs)


def mask_function(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """`padding_mask`, outside of graphs as well."""
    if torch.compiler.is_compiling():
        outside: torch.Tensor | None = torch.compiler.disable(padding_mask)(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no types here
        return outside
    return padding_mask(*args, **kwargs)


def bind(module: nn.Module, binding: Binding) -> None:
    """Tie an attention module to its layer of a plan."""
    _bindings[module] = binding


def is_bound(module: nn.Module) -> bool:
    """Whether an attention module is tied to a layer of a plan."""
    return module in _bindings


def unbind(module: nn.Module) -> None:
    """Undo `bind`."""
    _bindings.pop(module, None)


def padding_mask(
    *args: Any,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding of this step's tokens, bool [B, T], or None where there is none. Never a [T, N] mask.

    Raises:
        ModelError: the mask has not one column per token seen and to come (prefix tuning has more); or it has another
            window (`local_size`) than the config, in a model with one mask for all layers.
    """
    if config is not None and not getattr(config, "layer_types", None):
        _check_window(native_window(config), local_size)
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or not attention_mask.shape[1] == kv_length == q_offset + q_length:
        raise ModelError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the model has seen {q_offset} tokens and gets "
            f"{q_length}; wanted one column per token, [B, {q_offset + q_length}]"
        )
    step = attention_mask[:, q_offset:]  # [B, T]
    return None if bool(step.all()) else step


def _check_window(told: int | None, done: int | None) -> None:
    if told != done:
        raise ModelError(
            f"the model masks with a sliding window of {done} tokens, its config says {told}; "
            "set config.sliding_window to what the model does"
        )


def moa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer under the plan its model is attached to.

    Args:
        module: the layer's attention module, bound by `apply`.
        query: [B, HQ, T, D].
        key: this step's keys [B, HKV, T, D], tagged with the cache layer if there is a cache.
        value: [B, HKV, T, D].
        attention_mask: padding of this step, bool [B, T], or None.
        dropout: must be 0.
        scaling: factor on the scores.

    Returns:
        ([B, T, HQ, D], None); padding gives 0.

    Raises:
        ModelError: a feature that is not implemented, or a cache of another kind.
    """
    binding = _bindings.get(module)
    if binding is None:
        raise ModelError(
            f"{type(module).__name__} runs attention {NAME!r} without a plan; attach one with moa.hf.apply"
        )
    layer: MoaLayer | None = getattr(key, LAYER_TAG, None)
    _refuse(binding, attention_mask, dropout, kwargs)
    B, HQ, T, D = query.shape
    if key.shape[1] != (planned := binding.template.rules.alpha.shape[1]):
        raise ModelError(f"layer {binding.layer} has {key.shape[1]} KV heads, its config and the plan say {planned}")
    if value.shape[-1] != D:
        raise ModelError(
            f"layer {binding.layer} has values of {value.shape[-1]} numbers and keys of {D}; wanted one size"
        )
    if layer is None:
        rows, seen = _fresh_rows(binding, query, key, attention_mask, kwargs), 0
    else:
        rows, seen = layer.rows, layer.take(T)
    step = rows.step(binding.layer, B, T, seen, attention_mask)
    q, k, v = _packed(query), _packed(key), _packed(value)  # [B*T, H, D]
    options: dict[str, Any] = {"scale": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    run = _outside_autocast if torch.is_autocast_enabled(q.device.type) else _attended
    out: torch.Tensor = run(q, k, v, rows, binding.layer, step, options)  # [B*T, HQ, D]
    rows.usage.path = rows.memory.path
    return out.view(B, T, HQ, D), None


def _attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, layer: int, step: Step, options: dict[str, Any]
) -> torch.Tensor:
    """Packed tokens of a step attended, [B*T, HQ, D]; padding gives 0."""
    batch, real = step
    if real is None:
        out: torch.Tensor = attend(q, k, v, rows.memory, layer, batch, **options)  # [B*T, HQ, D]
        return out
    tokens = attend(q[real], k[real], v[real], rows.memory, layer, batch, **options)  # [T', HQ, D]
    return torch.zeros_like(q).index_copy(0, real, tokens)


def _outside_autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`_attended` in the one dtype that autocast gives to torch's own attention, and not in the region itself.

    Rotary positions make float32 of queries and keys, not of values; our scores keep the precision that they ask for.
    """
    device = q.device.type
    dtype = torch.float64 if q.dtype == torch.float64 else torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return _attended(q.to(dtype), k.to(dtype), v.to(dtype), *rest)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """The tokens of all rows [B, H, T, D] one after the other, [B*T, H, D]."""
    if x.shape[2] == 1:
        return x.select(2, 0)  # one cheap view: this runs for every layer of every decoded token
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _refuse(binding: Binding, mask: torch.Tensor | None, dropout: float, features: dict[str, Any]) -> None:
    if mask is not None and mask.ndim != 2:
        raise ModelError(f"a {mask.ndim}-D attention mask is not supported; pass the 2-D padding mask [B, N]")
    if dropout:
        raise ModelError(
            "attention dropout is not implemented; call model.eval(), or set config.attention_dropout to 0"
        )
    if "sliding_window" in features and features["sliding_window"] != binding.native_window:
        raise ModelError(
            f"layer {binding.layer} asks for a sliding window of {features['sliding_window']} tokens, "
            f"its config says {binding.native_window}"
        )


def _fresh_rows(
    binding: Binding, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, features: dict[str, Any]
) -> Rows:
    """Memory for one call without a cache."""
    if key.shape[2] != query.shape[2]:
        raise ModelError(
            f"{key.shape[2]} keys for {query.shape[2]} queries: this is a cache of another kind; "
            "pass past_key_values=model.moa.new_cache(), or none"
        )
    positions = features.get("position_ids")
    if mask is None and positions is not None and positions.ndim == 2 and (positions.diff() != 1).any():
        raise ModelError(
            "position_ids restart: several sequences packed in one row are not supported; pad them instead"
        )
    return Rows(binding.template.fresh())
