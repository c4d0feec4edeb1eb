"""The one entry point to attention under a plan, and the backends behind it. Nothing falls back in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from moa.errors import UsageError, closest
from moa.kernels import reference, torch_backend
from moa.kernels.batch import Batch
from moa.kernels.check import check_scores, check_step
from moa.kernels.memory import KVMemory, TorchMemory
from moa.kernels.scores import Attended, Scores, lse_dtype
from moa.spans import SpanRules


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to attend: its kind of KV memory, what a reader of a result must know about it, and options of its memory."""

    name: str
    memory: Callable[..., KVMemory]
    attend: Callable[..., Attended]
    note: str
    options: tuple[str, ...] = ()
    saves_memory: bool = True


def _paged_memory(rules: SpanRules, native_windows: Sequence[int | None] = (), **options: Any) -> KVMemory:
    """Memory of the Triton backend; importing it imports triton, so that happens here.

    Raises:
        UsageError: there is no triton, or no GPU and kernels are not interpreted.
    """
    try:
        from moa.kernels.paged.backend import check_machine
        from moa.kernels.paged.memory import PagedMemory
    except ImportError as error:
        raise UsageError(f"the Triton backend needs triton ({error}); install it, or use backend 'torch'") from error
    check_machine()
    return PagedMemory(rules, native_windows, **options)


def _paged_attend(*args: Any) -> Attended:
    from moa.kernels.paged.backend import attend as paged

    return paged(*args)


BACKENDS = {
    "torch": Backend("torch", TorchMemory, torch_backend.attend, "drops keys and values that no span keeps"),
    "triton": Backend(
        "triton",
        _paged_memory,
        _paged_attend,
        "drops pages of 64 tokens that no span keeps",
        options=("pages", "kv_dtype", "launches"),
    ),
    "reference": Backend(
        "reference",
        reference.ReferenceMemory,
        reference.attend,
        "accuracy only: saves no memory",
        saves_memory=False,
    ),
}


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UsageError: there is none; names the known ones.
    """
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise UsageError(f"there is no attention backend {name!r}, known are {known}{closest(str(name), BACKENDS)}")
    return BACKENDS[name]


def new_memory(name: str, rules: SpanRules, native_windows: Sequence[int | None] = (), **options: Any) -> KVMemory:
    """Empty KV memory for the backend called `name`.

    Args:
        name: of the backend.
        rules: spans of all layers and KV heads.
        native_windows: the model's own sliding window per layer in tokens, None where a layer has none.
        options: what the backend's memory knows beside: for "triton" `pages`, `kv_dtype` and `launches`, see
            `moa.kernels.paged.memory.PagedMemory`. One that is None is left out.

    Raises:
        UsageError: there is no such backend, or it has no such option.
    """
    backend = get_backend(name)
    chosen = {option: value for option, value in options.items() if value is not None}
    if unknown := sorted(set(chosen) - set(backend.options)):
        known = f"it has {', '.join(backend.options)}" if backend.options else "it has none"
        raise UsageError(
            f"backend {name!r} has no option {unknown[0]!r}, {known}{closest(unknown[0], backend.options)}"
        )
    return backend.memory(rules, native_windows, **chosen)


@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: KVMemory,
    layer: int,
    batch: Batch,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: KVMemory,
    layer: int,
    batch: Batch,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: KVMemory,
    layer: int,
    batch: Batch,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend over (live cache + this step's keys), then keep what later queries can still need.

    Args:
        q: queries of the step, packed over sequences, [T, HQ, D]; keys and queries carry their rotary position. Any
            strides.
        k: keys [T, HKV, D].
        v: values [T, HKV, D].
        kv: memory that holds every sequence of the batch; its kind chooses the backend.
        layer: index of the layer.
        batch: which tokens belong to which sequence, and their positions; each slice continues its sequence.
        scale: factor on the scores; 1/sqrt(D) by default.
        softcap: bound on the scores, as in Gemma 2.
        sinks: learned logit per query head, [HQ], as in gpt-oss.
        return_lse: also return the log-sum-exp of each token's scores.

    Returns:
        [T, HQ, D]; tokens in no slice give 0. With `return_lse` also the log-sum-exp over the keys, [T, HQ], natural
        log, without the learned sink, in float32 (float64 for float64); -inf for tokens in no slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown sequence, or a slice that does not continue
            it; found before any work, nothing has changed.
    """
    check_scores(scale, softcap)
    check_step(q, k, v, kv, layer, batch, sinks)
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:  # what every kernel wants
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if not batch.slices:  # all padding, nothing to store
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=lse_dtype(q.dtype))
        return (out, lse) if return_lse else out
    scores = Scores(q.shape[2] ** -0.5 if scale is None else scale, softcap, sinks, return_lse)
    found = BACKENDS[kv.backend].attend(q, k, v, kv, layer, batch, scores)
    return found[0] if found[1] is None else (found[0], found[1])
