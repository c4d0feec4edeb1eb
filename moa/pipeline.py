"""`compress`: calibration texts -> profile -> candidate plans -> the one that is best at an unseen length."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa import planning
from moa.calibration import TextSource
from moa.devices import compute_devices, input_device
from moa.distributed import Team
from moa.errors import ModelError, UsageError
from moa.eval.scoring import answer_loss
from moa.files import write_atomic
from moa.hf.apply import apply
from moa.hf.load import context_tokens
from moa.hf.shape import model_shape, unwrapped
from moa.hf.trial import check_runs
from moa.optimize.budget import budget_text
from moa.plan import PLAN_NAME, Calibration, ModelShape, Plan, Validation
from moa.plan_card import CARD_NAME, plan_card
from moa.profile import data, footprint
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.attention import backend_names
from moa.profile.collect import InfluenceSettings, profile_length
from moa.profile.sums import Sums
from moa.profile.supervise import greedy, supervise
from moa.settings import CompressSettings
from moa.stages import Workspace, key_of, log


@dataclass(frozen=True, slots=True)
class Compressed:
    """The chosen plan, and the front it was chosen from with each plan's true loss at the unseen length."""

    plan: Plan
    candidates: tuple[Plan, ...]
    true_losses: tuple[float, ...]
    dense_loss: float


# lambda of the rounds after the first: what the plan drops still counts a little, so that its loss has a gradient there.
AROUND_PLAN = 0.05
# Attention that candidates are tried with; it runs on any device.
VALIDATION_BACKEND = "torch"
Samples = dict[int, tuple[data.TextSample, ...]]


@dataclass(frozen=True, slots=True)
class _Job:
    """What every stage needs."""

    model: PreTrainedModel
    source: TextSource
    settings: CompressSettings
    shape: ModelShape
    workspace: Workspace
    team: Team
    checkpointing: bool

    @property
    def influence_backends(self) -> tuple[str, ...]:
        """Who will compute the influence, in the versions that matter to it alone."""
        names = backend_names(compute_devices(self.model), self.model.dtype, self.shape.head_dim)
        return tuple(f"triton {version('triton')}" if name == "triton" else name for name in names)

    @property
    def setting(self) -> dict[str, object]:
        """What decides every unit's result beside its own inputs: other versions or threads round differently."""
        return {
            "model": self.shape.fingerprint,
            "dtype": self.shape.dtype,
            "device": input_device(self.model).type,
            "attention": self.model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "versions": [version(name) for name in ("moa", "torch", "transformers")],
        }


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CompressSettings,
    workspace: Workspace,
    name: str = "",
    team: Team | None = None,
) -> Compressed:
    """Find the plan of least true loss within a density budget. Finished units in `workspace` are not done again.

    Args:
        model: a causal language model, unattached; may be in a PEFT wrapper.
        tokenizer: its fast tokenizer.
        settings: budget, lengths, data.
        workspace: where units and the plan are kept; `plan.json`, its card `README.md` and `profile.safetensors` end up
            in its folder.
        name: what to call the model in the plan.
        team: the processes that share the texts, each with the same arguments; the leader solves and writes.

    Raises:
        MoaError: see `moa.errors`; nothing is left half-written.
    """
    team = team or Team()
    job = _job(model, tokenizer, settings, workspace, name, team)
    samples = _calibration(job)
    profile = _profile(job, samples)
    candidates = _optimize(job, profile)
    for _ in range(1, settings.rounds):
        profile = _profile(job, samples, around=candidates[0])
        candidates = _optimize(job, profile)
    result = _validate(job, candidates)
    if team.leads:
        profile.save(workspace.folder / "profile.safetensors")
        write_atomic(workspace.folder / CARD_NAME, plan_card(result.plan).encode())
        result.plan.save(workspace.folder / PLAN_NAME)  # last: a folder with a plan is whole
    return result


def _job(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CompressSettings,
    workspace: Workspace,
    name: str,
    team: Team,
) -> _Job:
    model = unwrapped(model)
    check_lengths(model, settings)
    check_runs(model)
    team.wait()  # until all have loaded their models, and before any takes more: they share what is free
    checkpointing = _checkpointing(model, settings)
    team.wait()
    source = TextSource.open(tokenizer, settings)
    return _Job(model, source, settings, model_shape(model, name), workspace, team, checkpointing)


def check_lengths(model: PreTrainedModel, settings: CompressSettings) -> None:
    """Refuse lengths that the model was not made for, before any work.

    Raises:
        UsageError: the longest length exceeds the model's context.
    """
    context = context_tokens(model.config)
    if context is not None and settings.budget is not None and (settings.budget.context_tokens or 0) > context:
        raise UsageError(f"{settings.budget.option} exceeds the model's context of {context} tokens")
    if context is not None and settings.unseen_tokens > context:
        raise UsageError(
            f"--validate-length {settings.unseen_tokens} exceeds the model's context of {context} tokens; "
            "use shorter --lengths, or a --validate-length within it"
        )


def _checkpointing(model: PreTrainedModel, settings: CompressSettings) -> bool:
    """Whether to checkpoint gradients; refuses now what would run out of memory hours into the run."""
    longest = settings.lengths_tokens[-1]
    try:
        found = footprint.fit(
            footprint.meta_twin(model),
            longest,
            settings.spans,
            settings.gradient_checkpointing,
            footprint.available_bytes(model),
        )
    except ModelError as error:
        log.warning("how much memory this takes is not known: %s", error)
        return bool(settings.gradient_checkpointing)
    found.require(longest)
    if not found.fits:
        log.warning(
            "profiling %d tokens needs about %d MiB, and %d MiB are free: it may run out of memory",
            longest,
            found.peak_bytes >> 20,
            found.available_bytes >> 20,
        )
    if found.checkpointing and settings.gradient_checkpointing is None:
        log.info("gradient checkpointing is on, because memory would be short without it")
    return found.checkpointing


def _calibration(job: _Job) -> Samples:
    """Texts with answers for every profiled length."""
    settings = job.settings
    samples = {n: _texts(job, n, settings.num_samples, settings.seed) for n in settings.lengths_tokens}
    fewest = min(map(len, samples.values()))
    if fewest < job.team.world:
        raise UsageError(
            f"{job.team.world} processes cannot share {fewest} texts; start at most {fewest}, or give more --num-samples"
        )
    log.info("a text of %d tokens: %s", min(samples), job.source.shown(samples[min(samples)][0]))
    return samples


def _texts(job: _Job, n_tokens: int, count: int, seed: int, *, validate: bool = False) -> tuple[data.TextSample, ...]:
    """Texts with the answers that count; those that the model gives are a resumable unit."""
    raw = job.source.samples(n_tokens, count, seed, validate=validate)
    _require_known(job, raw)
    if job.settings.supervision == "reference":
        return raw
    most = job.settings.max_answer_tokens
    generation = greedy(job.model, most).to_dict()
    mine = job.team.shard(raw)
    key = key_of(setting=job.setting, samples=data.digest(mine), generation=generation)
    name = f"answers-{n_tokens}{job.team.suffix}"
    part = job.workspace.part(name, key)

    def make() -> object:
        done = [asdict(sample) for sample in part.load(_samples_from_bytes) or ()]
        _say_begun(name, len(done), len(mine))
        for sample in supervise(job.model, mine[len(done) :], most):
            done.append(asdict(sample))
            if len(done) < len(mine):
                part.save(json.dumps(done).encode())
        return done

    answered = job.workspace.json_unit(name, key, make, data.samples_from) if mine else ()
    return job.team.gather(answered, asdict, lambda sample: data.samples_from([sample])[0])


def _samples_from_bytes(kept: bytes) -> tuple[data.TextSample, ...]:
    return data.samples_from(json.loads(kept))


def _say_begun(name: str, done: int, total: int) -> None:
    if done:
        log.info("%s: %d of %d texts were done before", name, done, total)


def _require_known(job: _Job, samples: Sequence[data.TextSample]) -> None:
    known = len(job.model.get_input_embeddings().weight)  # type: ignore[arg-type]  # [V, W]; typed as any module
    largest = max(max(sample.token_ids) for sample in samples)
    if largest >= known:
        raise ModelError(
            f"the tokenizer gives token {largest} and the model knows {known} tokens; "
            "the tokenizer files belong to another model"
        )


def _profile(job: _Job, samples: Samples, around: Plan | None = None) -> Profile:
    """Influence at every length, one resumable unit each: at the dense model, or on the way to the plan `around`."""
    settings = job.settings
    calibration = job.source.record(samples)
    lengths = tuple(_profile_length(job, n, texts, calibration, around) for n, texts in samples.items())
    backends = tuple(sorted({name for at in lengths for name in at.backends}))
    calibration = calibration.model_copy(update={"influence_backends": backends})
    return Profile(job.shape, calibration, *settings.spans, lengths)


def _profile_length(
    job: _Job, n_tokens: int, texts: Sequence[data.TextSample], calibration: Calibration, around: Plan | None = None
) -> LengthProfile:
    """Influence at one length; each process makes its share of the texts a resumable unit."""
    settings, mine = job.settings, job.team.shard(texts)
    path = (1.0,) if around is None else (AROUND_PLAN,)
    influence = InfluenceSettings(settings.estimator, path, weighting=settings.weighting)
    key = key_of(
        setting=job.setting,
        texts=data.digest(mine),
        spans=settings.spans,
        influence=asdict(influence),
        backends=job.influence_backends,
        around=around.sha256 if around else None,
    )

    name = f"profile-{n_tokens}{job.team.suffix}"
    part = job.workspace.part(name, key)

    def on_sample(done: int) -> None:
        job.workspace.progress(f"profile {n_tokens} tokens", done, len(mine))

    def make() -> Profile:
        start = part.load(Sums.from_bytes)
        _say_begun(name, start.texts if start else 0, len(mine))
        at = profile_length(
            job.model,
            mine,
            n_tokens,
            *settings.spans,
            influence,
            on_sample,
            around.span_rules if around else None,
            checkpointing=job.checkpointing,
            start=start,
            keep=lambda sums: part.save(sums.to_bytes()),
        )
        return Profile(job.shape, calibration, *settings.spans, (at,))

    found = job.workspace.unit(name, key, ".safetensors", make, Profile.save, Profile.load).lengths[0]
    everyone = job.team.gather(found.backends, str, str)
    losses = job.team.mean(found.losses, len(mine))
    return replace(found, losses=losses, backends=tuple(sorted(set(everyone))))


def _optimize(job: _Job, profile: Profile) -> tuple[Plan, ...]:
    """Plans on the Pareto front of predicted losses, each within the density budget at every length; the leader solves."""
    return job.team.from_leader(lambda: _solve(job, profile), lambda plans: [p.to_json() for p in plans], _plans_from)


def _solve(job: _Job, profile: Profile) -> tuple[Plan, ...]:
    settings = job.settings
    if settings.budget:
        log.info("budget: %s", budget_text(settings.budget))
    rules, problem = planning.assignment_problem(profile, settings)
    key = key_of(
        setting=job.setting,
        losses=problem.loss.tolist(),
        rules=[asdict(rule) for rule in rules],
        budgets=[problem.budget_lengths, problem.density_budget, settings.budget],
        limits=[settings.max_rules_per_layer, settings.max_candidates, settings.front_levels],
        search=[settings.elastic, settings.per_layer],
        spans=settings.spans,
        model=profile.model.model_dump(),
        calibration=profile.calibration.model_dump(),
    )

    def make() -> object:
        return [plan.to_json() for plan in planning.candidates(rules, problem, profile, settings)]

    plans = job.workspace.json_unit("optimize", key, make, _plans_from)
    for plan in plans:
        if plan.solver and plan.solver.status != "optimal":
            log.warning(
                "plan by %s is %.2g from the bound; HiGHS: %s",
                plan.solver.name,
                plan.solver.gap_ratio,
                plan.solver.milp_status,
            )
    return plans


def _plans_from(content: object) -> tuple[Plan, ...]:
    if not isinstance(content, list) or not content:
        raise ValueError("wanted a list of plans")
    return tuple(Plan.from_json(str(text), "optimize stage") for text in content)


def _validate(job: _Job, candidates: Sequence[Plan]) -> Compressed:
    """The candidate of least true loss at the unseen length, with that loss beside the dense model's."""
    settings = job.settings
    n, count = settings.unseen_tokens, max(2, settings.num_samples // 2)
    texts = _texts(job, n, count, settings.seed + 1, validate=True)
    tried = tuple(candidates)
    losses = []
    for i, plan in enumerate((None, *tried)):
        losses.append(_true_loss(job, texts, plan))
        job.workspace.progress(f"validate at {n} tokens", i + 1, len(tried) + 1)
    dense, sparse = losses[0], tuple(losses[1:])
    best = int(np.argmin(sparse))
    record = Validation(
        length_tokens=n, samples=len(texts), dense_loss=dense, sparse_loss=sparse[best], candidates=len(tried)
    )
    return Compressed(planning.renewed(tried[best], validation=record), tried, sparse, dense)


def _true_loss(job: _Job, texts: Sequence[data.TextSample], plan: Plan | None) -> float:
    """Mean loss per answer token, measured under the plan, or dense for None; each process's share a resumable unit."""
    mine = job.team.shard(texts)

    def make() -> object:
        with apply(job.model, plan, backend=VALIDATION_BACKEND) if plan else nullcontext():
            loss = answer_loss(job.model, mine)
        if not math.isfinite(loss):
            raise ModelError(
                f"the model's answer loss is {loss}; its weights are damaged, or --dtype is too narrow for it"
            )
        return loss

    ran = (plan.sha256, VALIDATION_BACKEND) if plan else ("dense", "")
    key = key_of(setting=job.setting, texts=data.digest(mine), plan=ran)
    found = job.workspace.json_unit(f"validate{job.team.suffix}", key, make, _finite) if mine else 0.0
    answers = sum(len(text.answer_positions) for text in mine)
    return float(job.team.mean(np.array([found]), answers)[0])


def _finite(content: object) -> float:
    if not isinstance(content, float) or not math.isfinite(content):
        raise ValueError("wanted a finite number")
    return content
