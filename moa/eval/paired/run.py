"""The same tasks under several ways of running one model: dense first, then each other, sample by sample."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.errors import UsageError
from moa.eval.conditions import environment
from moa.eval.harness import MODEL
from moa.eval.lm import MoaLM
from moa.eval.longtext.kept import tokenizer_digest
from moa.eval.paired.kv_size import KvUse, kv_sizes
from moa.eval.paired.records import DENSE, EvalConditions, PairedReport, TaskInfo, TaskScores, Variant
from moa.eval.paired.scores import task_scores
from moa.eval.paired.settings import SEEDS, EvalSettings
from moa.eval.paired.tasks import LoadedTasks
from moa.eval.records import PlanRef
from moa.hf.load import context_tokens
from moa.hf.shape import fingerprint, unwrapped
from moa.kernels.dispatch import get_backend
from moa.local_paths import public_command, public_name
from moa.plan import Plan
from moa.profile.chat import Chat
from moa.stages import Progress, silent

LIBRARIES = ("moa", "torch", "transformers", "lm_eval", "datasets", "tokenizers", "accelerate", "numpy")
Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """A way of running the model that is to be compared with dense.

    Args:
        name: what the results are called.
        attach: makes the model run that way while the context lasts.
        plan: the plan, where it is one.
        settings: of any other method, for the report.
        kv: KV bytes of one sequence at each length; asked after the run, so that they may be measured there.
        equal_to: the way whose KV bytes this one has.
    """

    name: str
    attach: Callable[[MoaLM], AbstractContextManager[object]]
    plan: Plan | None = None
    settings: dict[str, str] = field(default_factory=dict)
    kv: Callable[[PreTrainedModel, Sequence[int]], KvUse] = lambda model, lengths_tokens: KvUse()
    equal_to: str = ""

    @classmethod
    def dense(cls) -> Way:
        """The model as it is."""
        return cls(DENSE, lambda lm: nullcontext(), kv=lambda model, lengths: KvUse(kv_sizes(model, lengths, None)))

    @classmethod
    def under(cls, plan: Plan, *, name: str = "moa", backend: str = "torch", allow_other_weights: bool = False) -> Way:
        """The model under a plan."""
        saves = get_backend(backend).saves_memory
        return cls(
            name,
            lambda lm: lm.attach(plan, backend, allow_other_weights=allow_other_weights),
            plan,
            kv=lambda model, lengths: KvUse(kv_sizes(model, lengths, plan.span_rules), saves),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A report, and what lm-eval says of each variant, samples included."""

    report: PairedReport
    results: dict[str, Results]


@dataclass(frozen=True, slots=True)
class _Run:
    """One variant's."""

    variant: Variant
    scores: tuple[TaskScores, ...]
    results: Results


@dataclass(frozen=True, slots=True)
class _Room:
    """Room for prompt and answer, the tokens of the chat template in it, and how much further texts go than the context."""

    max_length_tokens: int
    context_tokens: int | None
    beyond_context_tokens: int
    template_tokens: int


def run_paired(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    settings: EvalSettings,
    ways: Sequence[Way],
    progress: Progress = silent,
) -> Outcome | None:
    """Evaluate dense, then every way, on the same samples with the same weights in memory.

    Several processes that a launcher has started share the samples of each task; the numbers are those of one process.

    Args:
        model: without a plan applied; left as it was.
        ways: beside dense, which is always first.

    Returns:
        What was found; None in a process that only helps another one.

    Raises:
        UsageError: two ways of one name, or fewer samples than processes.
        ModelError, PlanError: a way cannot be gone with this model.
    """
    began = time.monotonic()
    ways = (Way.dense(), *ways)
    if len({way.name for way in ways}) != len(ways):
        raise UsageError(f"ways of running the model need names of their own, got {[way.name for way in ways]}")
    lm = MoaLM(model, tokenizer=tokenizer, batch_size=settings.batch_size, prefill_chunk=settings.prefill_chunk_tokens)
    if tasks.fewest_samples < lm.world_size:
        raise UsageError(f"{lm.world_size} processes cannot share {tasks.fewest_samples} samples; start fewer")
    chat = Chat.of(lm.tokenizer, settings.chat_template)
    room = _make_room(lm, settings, tasks, chat)
    runs = []
    for done, way in enumerate(ways, 1):
        runs += _run(lm, settings, tasks, way, bool(chat.template))
        progress("evaluate", done, len(ways))
    if lm.rank != 0:
        return None
    report = PairedReport(
        conditions=_conditions(lm, settings, room, chat, time.monotonic() - began),
        variants=tuple(run.variant for run in runs),
        tasks=_task_infos(runs[0].results),
        scores=tuple(scores for run in runs for scores in run.scores),
    )
    return Outcome(report, {run.variant.name: run.results for run in runs})


def _run(lm: MoaLM, settings: EvalSettings, tasks: LoadedTasks, way: Way, chat: bool) -> list[_Run]:
    """One way's results, in the process that leads; in the others nothing."""
    lm.forget_cuts()
    with way.attach(lm):
        results = _evaluate(lm, settings, tasks, chat)
        attention = lm.attention
    if results is None:
        return []
    use = way.kv(lm.model, settings.lengths_tokens)
    variant = Variant(
        name=way.name,
        attention=attention,
        plan=PlanRef.of(way.plan, settings.lengths_tokens) if way.plan else None,
        settings={**way.settings, **use.notes},
        kv=use.sizes,
        saves_memory=use.saves_memory,
        equal_to=way.equal_to,
    )
    scores = task_scores(way.name, results["samples"], results["higher_is_better"], lm.was_cut)
    return [_Run(variant, scores, results)]


def _make_room(lm: MoaLM, settings: EvalSettings, tasks: LoadedTasks, chat: Chat) -> _Room:
    """Room for the longest text, the longest answer and the template; the model's own where prompts have any length."""
    template = _template_tokens(lm) if chat.template else 0
    context = context_tokens(unwrapped(lm.model).config)
    longest = max(settings.lengths_tokens)
    wanted = longest + tasks.answer_tokens + template
    if tasks.of_any_length and context:
        wanted = max(wanted, context) if tasks.made_to_length else context
    lm.set_max_length(settings.max_length_tokens or wanted)
    # a text's length holds its answer
    needed = min(longest + template, lm.max_length) if tasks.made_to_length else 0
    return _Room(lm.max_length, context, max(0, needed - context) if context else 0, template)


def _template_tokens(lm: MoaLM) -> int:
    """Tokens that the chat template puts around a text."""
    around = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": "a"}]))
    return max(0, len(around) - len(lm.tokenizer.encode("a", add_special_tokens=False)))


def _evaluate(lm: MoaLM, settings: EvalSettings, tasks: LoadedTasks, chat: bool) -> Results | None:
    """lm-eval's results; what it prints goes to stderr, for stdout is the report's.

    Not by its `simple_evaluate`: that one spends more time on listing what is installed than on a short task.
    """
    from lm_eval import evaluate
    from lm_eval.loggers.utils import add_tokenizer_info

    _seed(tasks)
    with contextlib.redirect_stdout(sys.stderr):
        results: Results | None = evaluate(
            lm=lm,
            task_dict={"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
            limit=settings.limit,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    if results is None:
        return None
    results["config"] = {
        "model": MODEL,
        "model_args": {"pretrained": public_name(settings.model), "revision": settings.revision},
        **lm.get_model_info(),
        "batch_size": settings.batch_size,
        "device": str(lm.device),
        "limit": settings.limit,
        **SEEDS,
    }
    results |= {"date": time.time(), "transformers_version": version("transformers")}
    results |= {"lm_eval_version": version("lm_eval"), "model_name": public_name(settings.model)}
    results["chat_template"] = lm.chat_template(True) if chat else None
    add_tokenizer_info(results, lm)
    return results


def _seed(tasks: LoadedTasks) -> None:
    """Set all seeds as lm-eval's command does, and the number of examples where a task leaves it open."""
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_random_seed"])  # tasks draw from it
    torch.manual_seed(SEEDS["torch_random_seed"])
    for task in tasks.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot_random_seed"])


def _task_infos(results: Results) -> tuple[TaskInfo, ...]:
    return tuple(
        TaskInfo(
            name=task,
            version=str(results["versions"].get(task, "")),
            samples_hash=_samples_hash(samples),
            samples_original=results["n-samples"][task]["original"],
            samples_used=results["n-samples"][task]["effective"],
        )
        for task, samples in results["samples"].items()
    )


def _samples_hash(samples: Sequence[dict[str, Any]]) -> str:
    """lm-eval's `task_hashes`: of what is asked and wanted."""
    parts = (each["doc_hash"] + each["prompt_hash"] + each["target_hash"] for each in samples)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _conditions(lm: MoaLM, settings: EvalSettings, room: _Room, chat: Chat, time_s: float) -> EvalConditions:
    core = unwrapped(lm.model)
    return EvalConditions(
        model_name=public_name(settings.model),
        model_fingerprint=fingerprint(core),
        model_revision=settings.revision,
        model_commit=_commit(core),
        architecture=type(core).__name__,
        parameters=sum(p.numel() for p in core.parameters()),
        tokenizer_sha256=tokenizer_digest(lm.tokenizer),
        environment=environment(core),
        versions={name: version(name) for name in LIBRARIES},
        chat_template=chat.template,
        chat_template_sha256=chat.sha256,
        lengths_tokens=settings.lengths_tokens,
        max_length_tokens=room.max_length_tokens,
        context_tokens=room.context_tokens,
        beyond_context_tokens=room.beyond_context_tokens,
        template_tokens=room.template_tokens,
        batch_size=settings.batch_size,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        num_samples=settings.num_samples,
        data_seed=settings.data_seed,
        seeds=dict(SEEDS),
        limit=settings.limit,
        smoke_test=settings.limit is not None,
        options={name: public_name(value) for name, value in settings.options.items()},
        processes=lm.world_size,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(public_command(sys.argv)),
        time_s=time_s,
    )


def _commit(model: PreTrainedModel) -> str:
    """The hub's commit, which the cache names a folder after; "" of a model that is a folder of its own."""
    parts = Path(str(model.config._name_or_path)).parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""
