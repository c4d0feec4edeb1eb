"""What must hold before attend() does any work: one error naming the argument, what was wanted and got, and the way out.

A refused call has changed nothing, so the corrected call gives the right result. Runs for every layer and token: no
loop over tokens, no look at values. What concerns the slices of a step alone is checked when its `Batch` is made.
"""

from __future__ import annotations

import math

import torch

from moa.kernels.batch import Batch
from moa.kernels.memory import KVMemory

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: KVMemory,
    layer: int,
    batch: Batch,
    sinks: torch.Tensor | None,
) -> None:
    """Refuse a call of `moa.kernels.dispatch.attend`, whose arguments these are, that cannot be meant.

    Raises:
        ValueError: names the argument, what was wanted, what was got, and what to do.
    """
    if not isinstance(kv, KVMemory):
        raise _refusal("kv", "KV memory", type(kv).__name__, "make it with new_memory()")
    if not isinstance(layer, int) or not 0 <= layer < len(kv.table.layers):
        raise _refusal(
            "layer",
            f"0 to {len(kv.table.layers) - 1}, the layers of the plan",
            layer,
            "use the plan that was made for this model",
        )
    _check_shapes(q, k, v, kv.rules.alpha.shape[1])
    _check_kinds(q, k, v)
    if sinks is not None:
        _check_sinks(q, sinks)
    _check_batch(batch, q.shape[0], kv, layer)
    _check_format((k.shape[2], k.dtype, k.device), kv, layer)


def check_scores(scale: float | None, softcap: float | None) -> None:
    """Refuse numbers that make every score NaN; raises ValueError."""
    if scale is not None and not _is_finite(scale):
        raise _refusal("scale", "a finite number", scale, "leave it out for 1/sqrt(head_dim)")
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise _refusal("softcap", "a finite number above 0", softcap, "leave it out for scores without a cap")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except TypeError:  # no number at all
        return False


def _refusal(argument: str, wanted: object, got: object, remedy: str) -> ValueError:
    return ValueError(f"{argument}: wanted {wanted}, got {got}; {remedy}")


def _shape_or_type(x: object) -> list[int] | str:
    return list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, planned: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.ndim != 3:
            raise _refusal(
                name,
                "a tensor [T, heads, head_dim]",
                _shape_or_type(x),
                "pack the sequences of a step along dimension 0",
            )
    (tokens, heads, size), (_, kv_heads, _) = q.shape, k.shape
    if size == 0 or heads == 0:
        raise _refusal("q", "at least 1 head of at least 1 number", list(q.shape), "check the model's head count")
    if kv_heads != planned:
        raise _refusal(
            "k", f"{planned} KV heads, as the plan has", kv_heads, "use the plan that was made for this model"
        )
    if heads % kv_heads:
        raise _refusal("q", f"a multiple of the {kv_heads} KV heads as query heads", heads, "do q and k fit together?")
    for name, x in (("k", k), ("v", v)):
        if x.shape != (tokens, kv_heads, size):
            wanted = f"{[tokens, kv_heads, size]}, to fit q {list(q.shape)}"
            raise _refusal(name, wanted, list(x.shape), "give this step's keys and values alone, not the cached ones")


def _check_kinds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        raise _refusal("q", "float32, bfloat16, float16 or float64", dtype, "convert q, k and v first")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise _refusal(name, f"{dtype}, as q is", x.dtype, "convert one of them first")
        if x.device != device:
            raise _refusal(name, f"device {device}, where q is", x.device, "move one of them first")


def _check_sinks(q: torch.Tensor, sinks: torch.Tensor) -> None:
    if not isinstance(sinks, torch.Tensor) or sinks.shape != (q.shape[1],):
        wanted = f"one learned sink per query head, [{q.shape[1]}]"
        raise _refusal("sinks", wanted, _shape_or_type(sinks), "give all query heads theirs, in the order of q")
    if not sinks.is_floating_point() or sinks.device != q.device:
        wanted = f"floating point on {q.device}, where q is"
        raise _refusal("sinks", wanted, f"{sinks.dtype} on {sinks.device}", "convert or move them first")


def _check_batch(batch: Batch, tokens: int, kv: KVMemory, layer: int) -> None:
    if not isinstance(batch, Batch):
        raise _refusal("batch", "a Batch", type(batch).__name__, "make it with Batch.pack()")
    if batch.end > tokens:
        wanted = f"slices within the {tokens} packed tokens of q"
        raise _refusal("batch", wanted, f"a slice that ends at {batch.end}", "do q and batch belong to one step?")
    if kv.lengths(batch.sequences, layer) != batch.positions:
        for item in batch.slices:
            if item.position != (length := kv.length(item.sequence, layer)):
                raise ValueError(
                    f"batch: sequence {item.sequence} has {length} tokens in layer {layer}, "
                    f"its next slice starts at position {item.position}; give its tokens in order, each once per layer"
                )


def _check_format(given: tuple[int, torch.dtype, torch.device], kv: KVMemory, layer: int) -> None:
    """Keys that lie beside others in memory are like them; memory without tokens takes any."""
    held = kv.formats.get(layer)
    if held == given:
        return
    if held is not None and any(kv.lengths(kv.sequences, layer)):
        wanted, got = (f"head_dim {size}, {dtype} on {device}" for size, dtype, device in (held, given))
        raise _refusal("k", f"{wanted}, as layer {layer} holds already", got, "use new memory for another format")
    kv.formats[layer] = given
