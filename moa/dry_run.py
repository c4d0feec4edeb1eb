"""One text through every stage at the longest lengths, to know before a run what it will take.

The prediction of `moa.estimate` stands beside what was just measured, and the whole run is scaled from the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa import pipeline, process_memory  # the pipeline's very stages, and not copies of them
from moa.distributed import Team
from moa.errors import ResourceError
from moa.estimate import Estimate, estimate_compress
from moa.hf.load import load_model, load_tokenizer
from moa.plan import Plan
from moa.settings import CompressSettings
from moa.stages import Progress, Workspace, shortage_named, silent


@dataclass(frozen=True, slots=True)
class Step:
    """One text in one stage.

    Args:
        name: "answers", "profile", "validate dense" or "validate plan".
        length_tokens: of the text.
        predicted_s, predicted_bytes: by `moa.estimate`; None where it does not say.
        measured_s, measured_bytes: just now; bytes beyond what the process held before it loaded the model, None where
            the system does not tell.
        whole_s: of this stage in the whole run, scaled from `measured_s`.
    """

    name: str
    length_tokens: int
    predicted_s: float | None
    measured_s: float
    predicted_bytes: int | None
    measured_bytes: int | None
    whole_s: float


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a whole run will take, by one text."""

    text: str
    steps: tuple[Step, ...]
    estimate: Estimate

    @property
    def whole_s(self) -> float:
        """Seconds of the whole run without the solver's."""
        return sum(step.whole_s for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """The highest peak measured; the predicted one where the system does not tell."""
        return max((step.measured_bytes or 0 for step in self.steps), default=0) or self.estimate.peak_bytes

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        steps = [asdict(step) for step in self.steps]
        found = {"text": self.text, "steps": steps, "whole_s": self.whole_s, "peak_bytes": self.peak_bytes}
        return {**found, "estimate": self.estimate.as_dict()}


def dry_run(
    name: str,
    settings: CompressSettings,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    progress: Progress = silent,
) -> DryRun:
    """Measure one text of the longest profiled length, and one of the validation length, in every stage of `compress`.

    Nothing is kept: units go to a temporary folder.

    Raises:
        ResourceError: memory ran out; names the step and its length.
        MoaError: whatever would stop the run itself before its first result.
    """
    predicted = estimate_compress(name, settings, dtype)
    meter = _Meter(progress)
    model, tokenizer = load_model(name, dtype, device_map), load_tokenizer(name)
    with TemporaryDirectory(prefix="moa-") as folder:
        text = _rehearse(model, tokenizer, settings, Workspace(Path(folder)), meter.step)
    return DryRun(text, tuple(_step(at, predicted, settings) for at in meter.taken), predicted)


def _rehearse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CompressSettings,
    workspace: Workspace,
    step: Callable[[str, int], AbstractContextManager[object]],
) -> str:
    """Take one text through every stage but the solver's, each inside its `step`; returns what of it people are shown."""
    job = pipeline._job(model, tokenizer, settings, workspace, "", Team())
    longest, unseen = settings.lengths_tokens[-1], settings.unseen_tokens
    with step("answers", longest):
        texts = pipeline._texts(job, longest, 1, settings.seed)
    with step("profile", longest):
        pipeline._profile_length(job, longest, texts, job.source.record({longest: texts}))
    held_out = pipeline._texts(job, unseen, 1, settings.seed + 1, validate=True)
    sink_tokens, min_span_tokens = settings.spans
    plan = Plan.uniform(job.shape, 0, settings.density, sink_tokens=sink_tokens, min_span_tokens=min_span_tokens)
    for name, tried in (("validate dense", None), ("validate plan", plan)):
        with step(name, unseen):
            pipeline._true_loss(job, held_out, tried)
    return job.source.shown(texts[0])


@dataclass(frozen=True, slots=True)
class _Taken:
    name: str
    length_tokens: int
    time_s: float
    peak_bytes: int | None


class _Meter:
    """Time and peak memory of steps: the GPUs' where there are any, else the process's."""

    def __init__(self, progress: Progress) -> None:
        self.taken: list[_Taken] = []
        self._progress = progress
        self._before = 0 if torch.cuda.is_available() else _told(process_memory.held_bytes) or 0

    @contextmanager
    def step(self, name: str, n_tokens: int) -> Iterator[None]:
        """Measure what happens inside."""
        _reset_peak()
        started = time.perf_counter()
        with shortage_named(f"{name} at {n_tokens} tokens"):
            yield
            _wait()
        peak = _peak_bytes()
        peak = None if peak is None else max(0, peak - self._before)
        self.taken.append(_Taken(name, n_tokens, time.perf_counter() - started, peak))
        self._progress(f"{name} at {n_tokens} tokens", 1, 1)


def _reset_peak() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(ResourceError):  # the peak is then the process's so far
        process_memory.reset_peak()


def _wait() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def _peak_bytes() -> int | None:
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return _told(process_memory.peak_bytes)


def _told(ask: Callable[[], int]) -> int | None:
    """A size of this process; None where the system does not tell."""
    with suppress(ResourceError):
        return ask()
    return None


def _step(at: _Taken, predicted: Estimate, settings: CompressSettings) -> Step:
    """The measurement beside its prediction, scaled to the whole run."""
    lengths = {found.length_tokens: found for found in predicted.lengths}
    found, longest, unseen = lengths[at.length_tokens], settings.lengths_tokens[-1], settings.unseen_tokens
    validations = max(2, settings.num_samples // 2)
    if at.name == "answers":  # as long as one forward pass: by tokens, the least it can grow with
        tokens = settings.num_samples * sum(settings.lengths_tokens) + validations * unseen
        return Step(at.name, longest, None, at.time_s, None, at.peak_bytes, at.time_s * tokens / longest)
    if at.name == "profile":
        profiled_s = sum(lengths[n].time_s for n in settings.lengths_tokens)
        passes = settings.rounds * settings.num_samples
        one_s, times = found.time_s / passes, passes * profiled_s / found.time_s
    else:
        times = validations * (1 if at.name == "validate dense" else settings.max_candidates)
        one_s = found.time_s / (validations * (1 + settings.max_candidates))
    return Step(at.name, at.length_tokens, one_s, at.time_s, found.peak_bytes, at.peak_bytes, at.time_s * times)
