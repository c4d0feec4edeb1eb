"""The Triton backend: attention over pages and this step's keys, then survivors into pages.

Importing this module imports triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from moa.errors import UsageError
from moa.kernels.batch import Batch
from moa.kernels.paged import launch
from moa.kernels.paged.arena import Arena, Step
from moa.kernels.paged.launch import Call, Partials
from moa.kernels.paged.lists import Lists, make_lists
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.scores import Attended, Scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
# Thread blocks of decode that share a multiprocessor: what registers and shared memory of its tile leave room for.
DECODES_PER_MULTIPROCESSOR = 2
_INTERPRETED_SLOTS = 2
_FP8_CAPABILITY = (8, 9)
_INTERPRETER_HINT = " (tests set TRITON_INTERPRET=1 before the start: kernels then run interpreted, slowly, on the CPU)"


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value to compare by
class Ready:
    """A step of one layer, ready to launch.

    Args:
        arena: pages of the layer.
        step: the batch in it.
        call: tensors and scores.
        lists: work.
    """

    arena: Arena
    step: Step
    call: Call
    lists: Lists


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: PagedMemory, layer: int, batch: Batch, scores: Scores
) -> Attended:
    """Attend over (live cache + this step's keys), then keep the survivors; see `moa.kernels.dispatch.attend`."""
    ready = prepare(q, k, v, kv, layer, batch, scores)
    run(ready)
    append(ready, kv)
    out = ready.call.out
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out = _WithoutGradient.apply(out, q, k, v)  # type: ignore[no-untyped-call]  # torch has no types here
    return out, ready.call.lse if scores.wants_lse else None


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: PagedMemory, layer: int, batch: Batch, scores: Scores
) -> Ready:
    """Everything that a step of one layer launches, with pages taken for its survivors; arguments as for `attend`."""
    _check(q, kv)
    arena, step = kv.step(layer, k, batch)
    q, scores = _positive(q.detach(), scores)
    call = _call(q, k.detach(), v.detach(), arena, step, layer, scores)
    return Ready(arena, step, call, _lists(q, k, arena, step))


def run(ready: Ready) -> None:
    """Attention alone, into the call's `out` and `lse`; running it again computes the same."""
    if ready.lists.prefill is not None:
        launch.attend_list(ready.call, *ready.lists.prefill)
    if ready.lists.decode is not None:
        _decode(ready.call, ready.lists)


def append(ready: Ready, kv: PagedMemory) -> None:
    """Write the survivors; the layer has then seen the step's tokens."""
    if len(ready.lists.blocks):
        launch.append(ready.call, ready.lists.blocks)
    kv.finish(ready.call.layer, ready.arena, ready.step)


def check_machine() -> None:
    """Refuse a machine on which no kernel can run; raises UsageError."""
    if not launch.INTERPRETED and not torch.cuda.is_available():
        raise UsageError(f"the Triton backend found no CUDA device; use backend 'torch'{_INTERPRETER_HINT}")


def _check(q: torch.Tensor, kv: PagedMemory) -> None:
    """Refuse what the kernels do not take, before anything changes."""
    if not launch.INTERPRETED and q.device.type != "cuda":
        raise UsageError(
            f"q: the Triton backend runs on CUDA, got a tensor on {q.device}; move the model to a GPU, or use "
            f"backend 'torch'{_INTERPRETER_HINT}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q: wanted float32, bfloat16 or float16, got {q.dtype}; use backend 'torch' for others")
    if q.shape[2] > LARGEST_HEAD_DIM:
        raise ValueError(f"q: wanted head_dim up to {LARGEST_HEAD_DIM}, got {q.shape[2]}; use backend 'torch'")
    if kv.kv_dtype == "fp8" and q.is_cuda and torch.cuda.get_device_capability(q.device) < _FP8_CAPABILITY:
        raise UsageError("kv_dtype 'fp8' needs a GPU of compute capability 8.9 or newer; use 'int8'")


def _positive(q: torch.Tensor, scores: Scores) -> tuple[torch.Tensor, Scores]:
    """The same scores with a scale above 0, which lets kernels scale the maximum instead of every score."""
    if scores.scale > 0:
        return q, scores
    return (-q, replace(scores, scale=-scores.scale)) if scores.scale else (q * 0, replace(scores, scale=1.0))


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arena: Arena, step: Step, layer: int, scores: Scores
) -> Call:
    T, HQ, D = q.shape
    out, lse = _scratch((T, HQ, D), q.dtype, q.device), _scratch((T, HQ), torch.float32, q.device)
    if sum(s.tokens for s in step.batch.slices) < T:  # tokens in no slice
        out.zero_()
        lse.fill_(-torch.inf)
    table = arena.table.on_device()
    return Call(q, k, v, out, lse, arena.pools, table, step.slices, step.pinned_on_device, arena.heads, layer, scores)


def _lists(q: torch.Tensor, k: torch.Tensor, arena: Arena, step: Step) -> Lists:
    """The work of a step, made by the first layer with this number of query heads."""
    group = q.shape[1] // k.shape[1]
    lists = step.lists.get(group)
    if lists is None:
        lists = step.lists[group] = make_lists(
            step.batch, step.slices, step.pinned_on_device, arena.heads, arena.rules, group, q, _slots(q.device)
        )
    return lists


def _decode(call: Call, lists: Lists) -> None:
    """Splits, then their merge. Which items have several is known on the device only, so both always run."""
    if lists.decode is None:
        return
    plan, tile = lists.decode
    work, items = plan.work[call.layer], plan.items[call.layer]
    shape, device = (work.shape[0], tile.rows, call.q.shape[2]), call.q.device
    partials = Partials(_scratch(shape, torch.float32, device), _scratch(shape[:2], torch.float32, device))
    launch.attend_list(call, work, tile, partials, short=True)
    launch.merge(call, items, tile, partials)


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@functools.cache
def _slots(device: torch.device) -> int:
    """Thread blocks of decode that a device runs at once."""
    if device.type != "cuda":
        return _INTERPRETED_SLOTS
    return DECODES_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class _WithoutGradient(torch.autograd.Function):
    """Lets a forward pass run outside of no_grad; a backward pass says that there is none."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise UsageError("the Triton backend has no gradient; use backend 'torch'")
