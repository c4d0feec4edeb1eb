"""The engine: continuous batching of any number of requests over one model, dense or under a plan."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from moa.devices import input_device
from moa.errors import ResourceError, UsageError, shortage
from moa.hf.load import context_tokens
from moa.hf.shape import check_plan, unwrapped
from moa.plan import Plan, load_plan
from moa.runner.calibration import measure
from moa.runner.cost_model import BudgetTuner, Float64Array, step_work
from moa.runner.layout import Layout, lay_out
from moa.runner.packed import PackedModel
from moa.runner.policies import Limits, Turn, get_order, get_policy
from moa.runner.request import (
    LARGEST_SEED,
    Completion,
    FinishReason,
    QueueFullError,
    Request,
    SamplingParams,
    TokenLogprobs,
    Update,
)
from moa.runner.sampling import Bias, Said, Sampled, logprobs_of, sample
from moa.runner.scheduler import Scheduler
from moa.runner.sequence import Sequence as Running
from moa.runner.settings import EngineSettings
from moa.runner.sizes import new_host
from moa.runner.stats import EngineStats, StepRecord
from moa.runner.text import TextStream
from moa.runner.trial import check_packs

# A request whose steps have run out of memory so often ends with an error; others may still fit.
MOST_SHORTAGES = 3


class Engine:
    """Runs requests over one model: each step is one packed forward pass over prompts' chunks and decodes together.

    Not for several threads at once; see `moa.runner.async_engine` for that. The model is put back as it was by
    `close()`, or at the end of the `with` block.

    Args:
        model: a transformers causal LM that the wrapper supports.
        plan: the plan to run it under, or where `load_plan` finds it; None runs it dense.
        settings: everything else.
        tokenizer: the model's fast tokenizer, for text and stop strings.
        clock: monotonic seconds.

    Raises:
        ModelError: the model cannot run packed.
        PlanError: there is no such plan, or it is for another model.
        UsageError: settings that cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan | str | Path | None = None,
        settings: EngineSettings | None = None,
        *,
        tokenizer: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or EngineSettings()
        self.plan = plan if plan is None or isinstance(plan, Plan) else load_plan(plan)
        self.tokenizer, self.clock, self.stats = tokenizer, clock, EngineStats()
        policy, order = get_policy(self.settings.policy), get_order(self.settings.order)
        model = unwrapped(model)
        if self.plan is not None:
            check_plan(model, self.plan, allow_other_weights=self.settings.allow_other_weights)
        check_packs(model)
        self.host = new_host(model, self.plan, self.settings)
        limits = _limits(self.settings, input_device(model))
        self.scheduler = Scheduler(policy, order, self.host.account, limits, self.host)
        self.vocabulary: int = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # typed as any module
        self.context_tokens = self.settings.context_tokens or context_tokens(model.config)
        self._ends = frozenset(_end_tokens(model))
        self._live: dict[str, list[Running]] = {}
        self._ready: list[Update] = []
        with ExitStack() as undo:  # undone at once if measuring fails
            self.packed = undo.enter_context(PackedModel(model))
            self.tuner = self._new_tuner(limits) if self.settings.tbt_ms is not None else None
            undo.pop_all()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do and nothing to tell."""
        return self.scheduler.is_idle and not self._ready

    def step(self) -> list[Update]:
        """Schedule, run, sample, postprocess: what is new about every request of the step."""
        started = self.clock()
        self._tune()
        turn, forward_s = self.scheduler.next_turn(started), 0.0
        if turn.chosen:
            try:
                layout, work = lay_out(turn), self._work(turn)
                logits, forward_s = self._run(layout)
                sampled = self._sample(layout, logits)
            except Exception as error:  # noqa: BLE001 - whatever a model raises ends requests, not the engine
                self._fail(turn, error)
            else:
                self.scheduler.settle(turn)
                self._postprocess(turn, layout, sampled)
                if self.tuner is not None and work is not None:
                    self.tuner.observe(work, self.clock() - started)
        self._record(turn, started, forward_s)
        return self._taken_ready()

    def add(self, prompt: Sequence[int], sampling: SamplingParams | None = None, name: str | None = None) -> str:
        """Queue a request, `n` completions of it; gives its name.

        Raises:
            UsageError: a token that the model does not know, no token at all, a name that is in use, or stop strings
                without a tokenizer.
            ResourceError: it is longer than the model's context, or could never fit into KV memory.
            QueueFullError: too many wait.
        """
        sampling = sampling or SamplingParams()
        name = secrets.token_hex(12) if name is None else name
        if sampling.n > self.settings.max_waiting:
            raise UsageError(f"n is {sampling.n}, and at most {self.settings.max_waiting} requests may wait; lower n")
        requests = self._requests(tuple(prompt), sampling, name)
        if len(self.scheduler.waiting) + len(requests) > self.settings.max_waiting:
            raise QueueFullError(
                f"{len(self.scheduler.waiting)} requests wait, at most {self.settings.max_waiting} may; try again later"
            )
        now = self.clock()
        group = [self._sequence(request, now) for request in requests]
        first = group[0]
        self.host.account.require_possible(len(first.tokens), first.most_cached_tokens, first.pinned_tokens)
        for sequence in group:
            self.scheduler.add(sequence)
        self._live[name] = group
        return name

    def cancel(self, name: str) -> bool:
        """End a request; the next step tells so. False if there is none of that name (any more)."""
        now, group = self.clock(), list(self._live.get(name, ()))
        for sequence in group:
            self._ready.append(self._end(sequence, FinishReason.CANCELLED, now))
        return bool(group)

    def generate(
        self, prompts: Iterable[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Run prompts to their ends; completions in order of the prompts, `n` of each.

        Args:
            prompts: token ids.
            sampling: of all prompts, or one for each.

        Raises:
            UsageError, ResourceError: as `add`; the others are cancelled.
        """
        if not self.is_idle:
            raise UsageError("generate() needs an engine with nothing else to do; use add() and step()")
        texts = list(prompts)
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(texts)
        told: dict[tuple[str, int], list[Update]] = {}
        names = [f"prompt-{i}-{secrets.token_hex(4)}" for i in range(len(texts))]
        todo = list(zip(texts, each, names, strict=True))[::-1]
        try:
            while todo or not self.is_idle:
                while todo and self._has_room(todo[-1][1]):
                    self.add(*todo.pop())
                for update in self.step():
                    told.setdefault((update.name, update.index), []).append(update)
        except BaseException:
            for name in names:
                self.cancel(name)
            self._ready.clear()
            raise
        counts = [1 if params is None else params.n for params in each]
        return [Completion.of(told[name, i]) for name, n in zip(names, counts, strict=True) for i in range(n)]

    def abandon(self, reason: str | None = None) -> list[Update]:
        """End all requests, for a reason or cancelled; their last updates."""
        finish, now = FinishReason.CANCELLED if reason is None else FinishReason.ERROR, self.clock()
        updates = self._taken_ready()
        for sequence in [sequence for group in self._live.values() for sequence in group]:
            updates.append(self._end(sequence, finish, now, reason))
        return updates

    def close(self) -> None:
        """Drop all requests and all memory, and put the model back as it was."""
        self.abandon()
        self.host.clear()
        self.packed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _new_tuner(self, limits: Limits) -> BudgetTuner:
        """Measure this model on this device, for `token_budget="auto"`."""
        model = measure(self.packed, self.host, self.context_tokens, limits.max_running)
        tbt_s = (self.settings.tbt_ms or 0.0) / 1000
        return BudgetTuner(model, self.host.account.footprint, tbt_s, limits.tile_tokens)

    def _tune(self) -> None:
        """Set the token budget of the next step."""
        if self.tuner is not None:
            scheduler = self.scheduler
            waiting = scheduler.waiting[0] if scheduler.waiting else None
            budget = self.tuner.budget(scheduler.running, waiting)
            scheduler.limits = replace(scheduler.limits, token_budget=budget)

    def _work(self, turn: Turn) -> Float64Array | None:
        return None if self.tuner is None else step_work(turn.parts, self.host.account.footprint)

    def _run(self, layout: Layout) -> tuple[torch.Tensor, float]:
        """Logits of the wanted places, and the seconds that they took."""
        started = self.clock()
        logits = self.packed.forward(
            layout.tokens, layout.positions, layout.batch, self.host.memory, layout.wanted
        )  # [wanted, V]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return logits, self.clock() - started

    def _sample(self, layout: Layout, logits: torch.Tensor) -> Sampled:
        """A token for each request that has none to compute before it; scores for prompts that want them."""
        first = len(layout.sampled)
        for item in layout.scored:
            rows = logits[first : first + len(item.tokens)]
            tops = [item.sequence.request.sampling.prompt_logprobs or 0] * len(item.tokens)
            item.sequence.prompt_logprobs += logprobs_of(rows, item.tokens, tops)
            first += len(item.tokens)
        return sample(logits[: len(layout.sampled)], [sequence.draw for sequence in layout.sampled])

    def _postprocess(self, turn: Turn, layout: Layout, sampled: Sampled) -> None:
        """Requests go on by their tokens; those that end give their memory back."""
        for sequence in _sequences(turn):
            self.host.leave(sequence)
        now = self.clock()
        for i, (sequence, token) in enumerate(zip(layout.sampled, sampled.tokens, strict=True)):
            if token is None:
                error = "the logits are not numbers (NaN or infinite)"
                self._ready.append(self._end(sequence, FinishReason.ERROR, now, error))
            elif not sequence.request.sampling.max_tokens:
                self._ready.append(self._end(sequence, FinishReason.LENGTH, now))
            else:
                self._take(sequence, token, sampled.logprobs.get(i), now)

    def _take(self, sequence: Running, token: int, logprobs: TokenLogprobs | None, now: float) -> None:
        """Let a request go on by a token; one whose text cannot be made of its tokens ends, alone."""
        try:
            update = sequence.take(token, logprobs, now)
        except Exception as error:  # noqa: BLE001 - whatever a tokenizer raises
            told = f"its tokens could not be made text: {type(error).__name__}: {error}"
            self._ready.append(self._end(sequence, FinishReason.ERROR, now, told))
            return
        self.stats.output_tokens += 1
        self._ready.append(update)
        if update.finish is not None:
            self._forget(sequence, update.finish)

    def _fail(self, turn: Turn, error: Exception) -> None:
        """End the requests of a step that raised; where it was memory that ran out, compute them anew a few times."""
        self.stats.failed_steps += 1
        is_shortage = isinstance(error, ResourceError) or shortage(error) is not None
        now = self.clock()
        for sequence in _sequences(turn):
            sequence.shortages += is_shortage
            if is_shortage and sequence.shortages <= MOST_SHORTAGES:
                self.scheduler.preempt(sequence)
            else:
                told = f"the step failed: {type(error).__name__}: {error}"
                self._ready.append(self._end(sequence, FinishReason.ERROR, now, told))

    def _end(self, sequence: Running, finish: FinishReason, now: float, error: str | None = None) -> Update:
        update = sequence.end(finish, now, error)
        self._forget(sequence, finish)
        return update

    def _forget(self, sequence: Running, finish: FinishReason) -> None:
        sequence.has_ended_well = finish in (FinishReason.STOP, FinishReason.LENGTH)
        self.scheduler.remove(sequence)
        self.stats.finished[finish] += 1
        name = sequence.request.name
        self._live[name].remove(sequence)
        if not self._live[name]:
            del self._live[name]

    def _record(self, turn: Turn, started: float, forward_s: float) -> None:
        self.stats.add(
            StepRecord(
                number=turn.number,
                started_s=started,
                seconds=self.clock() - started,
                forward_s=forward_s,
                prompt_tokens=turn.tokens - turn.decode_tokens,
                decode_tokens=turn.decode_tokens,
                preempted=len(turn.preempted),
                running=len(self.scheduler.running),
                waiting=len(self.scheduler.waiting),
                kv_usage_ratio=self.host.account.usage_ratio,
            )
        )

    def _taken_ready(self) -> list[Update]:
        ready, self._ready = self._ready, []
        return ready

    def _has_room(self, sampling: SamplingParams | None) -> bool:
        """Whether a request may be queued; of a queue that is empty, `add` says what is wrong."""
        waiting, more = len(self.scheduler.waiting), 1 if sampling is None else sampling.n
        return not waiting or waiting + more <= self.settings.max_waiting

    def _requests(self, prompt: tuple[int, ...], sampling: SamplingParams, name: str) -> list[Request]:
        """The completions asked for; raises as `add`."""
        if name in self._live:
            raise UsageError(f"a request named {name!r} is not finished yet; take another name")
        if not prompt:
            raise UsageError("a prompt must have at least 1 token")
        if any(type(token) is not int or not 0 <= token < self.vocabulary for token in prompt):
            raise UsageError(f"a prompt's tokens must be whole numbers from 0 to {self.vocabulary - 1}")
        if sampling.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; give the engine one, or use stop_token_ids")
        if any(token >= self.vocabulary for token, _ in sampling.biases):
            raise UsageError(f"logit_bias names a token above {self.vocabulary - 1}, the last that the model knows")
        if self.context_tokens is not None and len(prompt) + sampling.max_tokens > self.context_tokens:
            raise ResourceError(
                f"a prompt of {len(prompt)} tokens and up to {sampling.max_tokens} more do not fit into the model's "
                f"context of {self.context_tokens} tokens; shorten the prompt or lower max_tokens"
            )
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        pinned = len(prompt) + sampling.max_tokens if self.host.account.footprint.is_pinned else None
        return [
            Request(name, index, prompt, sampling, (seed + index) & LARGEST_SEED, pinned) for index in range(sampling.n)
        ]

    def _sequence(self, request: Request, now: float) -> Running:
        sampling = request.sampling
        return Running(
            order=next(self.host.ids),
            arrived_s=now,
            known_tokens=len(request.prompt),
            most_cached_tokens=request.most_cached_tokens,
            pinned_tokens=request.pinned_tokens,
            request=request,
            tokens=list(request.prompt),
            ends=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._ends),
            text=None if self.tokenizer is None else TextStream(self.tokenizer, sampling.stop, request.prompt),
            said=Said(request.prompt) if sampling.has_penalties else None,
            bias=Bias.of(sampling),
        )


def _limits(settings: EngineSettings, device: torch.device) -> Limits:
    budget = settings.token_budget
    return Limits(
        token_budget=None if budget == "auto" else budget,  # chosen anew for every step
        chunk_tokens=settings.chunk_tokens,
        max_running=settings.max_running,
        tile_tokens=settings.tile_tokens or (64 if device.type == "cuda" else 1),
    )


def _sequences(turn: Turn) -> list[Running]:
    return [job for job in turn.chosen if isinstance(job, Running)]


def _end_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens with which the model ends a text, as its generation config says."""
    config = model.generation_config
    ends = getattr(config, "eos_token_id", None) if config is not None else None
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]
