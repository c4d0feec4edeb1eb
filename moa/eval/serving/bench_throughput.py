"""`moa bench throughput`: all requests at once, beside transformers; long texts under a plan; and what the engine itself costs."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from transformers import PreTrainedModel

from moa.errors import UsageError
from moa.eval.serving.cases import Case
from moa.eval.serving.drive import Subject, drive
from moa.eval.serving.engine_subject import EngineSubject
from moa.eval.serving.subjects import KV_BYTES, MAX_RUNNING, sizes
from moa.eval.serving.summary import summary
from moa.eval.serving.throughput_rows import LongRow, OfflineRow, OverheadRow
from moa.eval.serving.transformers_subject import PAGE_TOKENS, LoopSubject, batching
from moa.eval.serving.workload import Lengths, Load, Workload
from moa.hf.shape import model_shape, model_sizes
from moa.plan import Plan
from moa.runner.engine import Engine
from moa.runner.settings import TOKEN_BUDGET, EngineSettings
from moa.runner.stats import StepRecord
from moa.stages import Progress

OURS, OURS_PLAN = "moa", "moa, plan"
OFFLINE_BUDGET = TOKEN_BUDGET
OVERHEAD_BATCH, OVERHEAD_STEPS = 32, 40
LONG_STEPS = 24
# Requests that transformers' continuous batching may run at a time: the best of these is what ours is held against,
# since its sdpa masks over the keys of all running requests together, and more of them at a time is slower on a CPU.
BATCHING_RUNNING = (1, 4, 16, MAX_RUNNING)
# Of the KV memory, for the one prompt that all long texts share.
CACHE_RATIO = 0.3
LEAST_LONG = 256
Opened = AbstractContextManager[Subject]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Args:
        turns: of everything.
        seed: of the first turn.
        plan: for offline runs, beside dense; None for dense alone.
        long_tokens: context of the texts that decode under a fixed KV budget; 0 for none.
        density: of the uniform plan there.
        dense_requests: that the budget holds without the plan.
    """

    turns: int = 3
    seed: int = 0
    plan: Plan | None = None
    long_tokens: int = 8192
    density: float = 0.25
    dense_requests: int = 4


@dataclass(slots=True)
class Results:
    """All rows."""

    offline: list[OfflineRow] = field(default_factory=list)
    long: list[LongRow] = field(default_factory=list)
    overhead: list[OverheadRow] = field(default_factory=list)
    cases: dict[str, Case] = field(default_factory=dict)
    batching_running: dict[str, int] = field(default_factory=dict)  # by model: what transformers' batching is best with


def bench_throughput(cases: Sequence[Case], settings: Settings, progress: Progress) -> Results:
    """Measure models one after the other, subjects in turns."""
    results = Results()
    for case in cases:
        results.cases[case.name] = case
        model = case.make()
        running = results.batching_running[case.name] = _best_running(case, model, settings.seed)
        for turn in range(settings.turns):
            results.offline += _offline(case, model, settings, turn, running)
            results.overhead.append(_overhead(case, model, turn))
            progress(f"{case.name}, offline", turn + 1, settings.turns)
        for turn in range(settings.turns if settings.long_tokens else 0):
            model = model if turn else _long_model(case, settings.long_tokens)
            results.long += _long(case, model, settings, turn)
            progress(f"{case.name}, long texts", turn + 1, settings.turns)
    return results


def _offline(case: Case, model: PreTrainedModel, settings: Settings, turn: int, running: int) -> Iterator[OfflineRow]:
    """Every subject on the same requests; which comes first alternates."""
    loads = _loads(case, model, settings.seed + turn)
    makers = list(_subjects(model, settings.plan, loads, running))
    for name, make in makers[:: -1 if turn % 2 else 1]:
        with make() as subject:
            drive(subject, loads[:1])  # the first run of anything is slow
            keys = summary(drive(subject, loads))
        gc.collect()
        yield OfflineRow(
            case.name,
            name,
            turn,
            keys["completed"],
            keys["total_input_tokens"],
            keys["total_output_tokens"],
            keys["duration"],
            keys["request_throughput"],
            keys["output_throughput"],
            keys["total_token_throughput"],
        )


def _loads(case: Case, model: PreTrainedModel, seed: int) -> tuple[Load, ...]:
    ask, (vocabulary, context) = case.offline, sizes(model)
    return Workload(ask.prompts, ask.outputs, ask.count, vocabulary, context_tokens=context).requests(seed)


def _best_running(case: Case, model: PreTrainedModel, seed: int) -> int:
    """How many requests at a time transformers' continuous batching is fastest with, on half of a turn's requests."""
    loads = _loads(case, model, seed)
    loads = loads[: max(1, len(loads) // 2)]
    speeds = {}
    for running in BATCHING_RUNNING:
        with _batching(model, loads, running) as subject:
            drive(subject, loads[:1])
            speeds[running] = summary(drive(subject, loads))["output_throughput"]
        gc.collect()
    return max(speeds, key=lambda running: speeds[running])


def _batching(model: PreTrainedModel, loads: Sequence[Load], running: int) -> Opened:
    """transformers' continuous batching with room for so many of the longest requests, in its pages."""
    longest = max(len(load.prompt) + load.output_tokens for load in loads)
    room = running * PAGE_TOKENS * (-(-longest // PAGE_TOKENS) + 1)
    return batching(model, room, OFFLINE_BUDGET, running)


def _subjects(
    model: PreTrainedModel, plan: Plan | None, loads: Sequence[Load], running: int
) -> Iterator[tuple[str, Callable[[], Opened]]]:
    """Ours and transformers' own."""
    yield OURS, partial(_engine, model, None)
    if plan is not None:
        yield OURS_PLAN, partial(_engine, model, plan)
    yield "transformers, continuous batching", partial(_batching, model, loads, running)
    yield "transformers, generate() in a loop", lambda: nullcontext(LoopSubject(model))


@contextmanager
def _engine(
    model: PreTrainedModel,
    plan: Plan | None,
    *,
    kv_bytes: int = KV_BYTES,
    token_budget: int = OFFLINE_BUDGET,
    max_running: int = MAX_RUNNING,
    cache_ratio: float = 0.0,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Iterator[EngineSubject]:
    settings = EngineSettings(
        token_budget=token_budget, max_running=max_running, kv_bytes=kv_bytes, prefix_cache_ratio=cache_ratio
    )
    with Engine(model, plan, settings) as engine:
        yield EngineSubject(OURS if plan is None else OURS_PLAN, engine, on_step=on_step)


def _overhead(case: Case, model: PreTrainedModel, turn: int) -> OverheadRow:
    """Steps of a full batch that does nothing but decode."""
    prompt = int(case.offline.prompts.median)
    asked = Workload(Lengths(prompt, prompt), Lengths(OVERHEAD_STEPS, OVERHEAD_STEPS), OVERHEAD_BATCH, sizes(model)[0])
    steps: list[StepRecord] = []
    with _engine(model, None, token_budget=1 << 20, on_step=steps.append) as subject:
        drive(subject, asked.requests(turn))
    pure = [step for step in steps if step.decode_tokens == OVERHEAD_BATCH and not step.prompt_tokens]
    beside = [step.seconds - step.forward_s for step in pure]
    return OverheadRow(
        case.name,
        turn,
        OVERHEAD_BATCH,
        prompt,
        len(pure),
        1e3 * statistics.median(step.seconds for step in pure),
        1e3 * statistics.median(beside),
        sum(beside) / sum(step.seconds for step in pure),
    )


def _long_model(case: Case, length: int) -> PreTrainedModel:
    """Raises UsageError if it does not read so much."""
    model = case.make_long()
    context = sizes(model)[1]
    if context is not None and context < length:
        raise UsageError(f"{case.name} reads {context} tokens, not {length}; lower --long-tokens, or 0 to leave it out")
    return model


def _long(case: Case, model: PreTrainedModel, settings: Settings, turn: int) -> Iterator[LongRow]:
    """Long texts of which the dense engine holds a few at a time: as many as fit, dense and under a uniform plan."""
    shape = model_sizes(model, str(model.dtype).removeprefix("torch."))
    plan = Plan.uniform(model_shape(model), 0, settings.density)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize
    # a little more than what the texts take, for spare rows and the share that stays free for growth
    budget = int(settings.dense_requests * settings.long_tokens * token_bytes * 1.05)
    for name, its in [(OURS, None), (f"{OURS}, {100 * settings.density:g} % plan", plan)][:: -1 if turn % 2 else 1]:
        concurrent, seconds = _decode_steps(model, its, settings.long_tokens, budget, settings.seed + turn)
        row = (case.name, name, turn, settings.long_tokens, budget)
        yield LongRow(*row, concurrent, 1e3 * seconds, concurrent / seconds)


def _decode_steps(model: PreTrainedModel, plan: Plan | None, length: int, budget: int, seed: int) -> tuple[int, float]:
    """The most requests that were in memory together, and the median step in which all of them decoded and nothing else.

    They have one prompt, which is computed once and kept for the others; each holds memory of its own.
    """
    steps: list[StepRecord] = []
    with _engine(
        model, plan, kv_bytes=budget, max_running=256, cache_ratio=CACHE_RATIO, on_step=steps.append
    ) as subject:
        fits = _fitting(subject.engine, length)
        tokens = 2 * LONG_STEPS + fits  # the first goes on while the last is admitted
        asked = Workload(Lengths(length - tokens, length - tokens), Lengths(tokens, tokens), 1, sizes(model)[0])
        (load,) = asked.requests(seed)
        drive(subject, (replace(load, prompt=load.prompt[:-1], output_tokens=1),))  # all but what each must compute
        drive(subject, (load,) * fits, give_up=lambda one: _enough(steps, fits))
    most = max(step.running for step in steps)
    pure = [step.seconds for step in steps if step.decode_tokens == most and not step.prompt_tokens]
    return most, statistics.median(pure)


def _fitting(engine: Engine, length: int) -> int:
    """How many requests of so many tokens the account has room for, as it admits them: with a hundredth to spare."""
    account = engine.host.account
    total = account.total_slots or 0
    return max(1, (total - total // 100) // account.footprint.most(length))


def _enough(steps: Sequence[StepRecord], wanted: int) -> bool:
    return sum(step.decode_tokens == wanted and not step.prompt_tokens for step in steps) >= LONG_STEPS
