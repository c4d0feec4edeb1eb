"""The Triton backend: attention over pages and this step's keys, then survivors into pages.

Importing this module imports triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moa.errors import UsageError
from moa.kernels.batch import Batch
from moa.kernels.paged import launch, splits
from moa.kernels.paged.arena import Arena, Step
from moa.kernels.paged.configs import check_heads, check_kv_kind
from moa.kernels.paged.hybrid import HybridWork, attend_hybrid
from moa.kernels.paged.launch import Call, Partials
from moa.kernels.paged.lists import Cut, Given, Lists, Machine, Whole, make_lists
from moa.kernels.paged.memory import PagedMemory
from moa.kernels.scores import Attended, Scores

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
    return Ready(arena, step, call, _lists(q, k, kv, arena, step))


def run(ready: Ready) -> None:
    """Attention alone, into the call's `out` and `lse`; running it again computes the same."""
    call, lists = ready.call, ready.lists
    if lists.launch != "serial" and isinstance(lists.prefill, Whole) and lists.decode is not None:
        return _together(call, lists, lists.prefill, lists.decode)
    for part in (lists.prefill, lists.decode):
        if isinstance(part, Whole):
            launch.attend_list(call, part.work, part.tile)
        elif part is not None:
            _splits(call, part)


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
    check_heads(q.shape[2], q.dtype)
    check_kv_kind(kv.kv_dtype or "model", Machine.of(q.device).device)


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
    table = arena.table.on_device(arena.pool.pages, arena.coded.pages)
    return Call(q, k, v, out, lse, arena.pools, table, step.slices, step.pinned_on_device, arena.heads, layer, scores)


def _lists(q: torch.Tensor, k: torch.Tensor, kv: PagedMemory, arena: Arena, step: Step) -> Lists:
    """The work of a step, made by the first layer with this number of query heads."""
    group = q.shape[1] // k.shape[1]
    lists = step.lists.get(group)
    if lists is None:
        host = splits.Step(step.account, step.pinned, group)
        kind = kv.kv_dtype or "model"
        given = Given(host, step.slices, step.pinned_on_device, arena.heads, arena.rules, kind, kv.launches)
        lists = step.lists[group] = make_lists(given, q)
    return lists


def _splits(call: Call, part: Cut) -> None:
    """Splits, then their merge. Which items have several is known on the device only, so both always run."""
    partials = _partials(call, part)
    launch.attend_list(call, part.plan.work[call.layer], part.tile, partials, short=part.short)
    launch.merge(call, part.plan.items[call.layer], part.tile, partials)


def _together(call: Call, lists: Lists, prefill: Whole, decode: Cut) -> None:
    """Prefill tiles and splits in one launch, then the merge."""
    partials, plan, tickets = _partials(call, decode), decode.plan, None
    work, live = plan.work[call.layer], plan.live[call.layer : call.layer + 1]
    if lists.launch == "tickets":
        tickets = lists.tickets[call.layer]
        tickets.counters.zero_()
    attend_hybrid(call, HybridWork(prefill.work, work, live, prefill.tile, decode.tile), partials, tickets)
    launch.merge(call, plan.items[call.layer], decode.tile, partials)


def _partials(call: Call, part: Cut) -> Partials:
    shape, device = (part.plan.work.shape[1], part.tile.rows, call.q.shape[2]), call.q.device
    return Partials(_scratch(shape, torch.float32, device), _scratch(shape[:2], torch.float32, device))


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class _WithoutGradient(torch.autograd.Function):
    """Lets a forward pass run outside of no_grad; a backward pass says that there is none."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise UsageError("the Triton backend has no gradient; use backend 'torch'")
