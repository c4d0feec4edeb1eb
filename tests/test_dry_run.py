"""A dry run really runs one text through every stage, and scales what it measured."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moa import dry_run as module
from moa import pipeline
from moa.dry_run import _Meter, _Taken, dry_run
from moa.errors import ResourceError, UsageError
from moa.estimate import estimate_compress
from moa.settings import CompressSettings

SETTINGS = CompressSettings(lengths_tokens=(64, 128), validate_length_tokens=160, num_samples=6, max_candidates=3)
MIB = 1 << 20


def test_one_text_goes_through_every_stage_at_the_longest_length(tiny_folder: Path, monkeypatch) -> None:
    profiled, validated = [], []
    profile_length, answer_loss = pipeline.profile_length, pipeline.answer_loss

    def watched_profile(model, samples, n_tokens, *rest, **more):
        profiled.append((len(samples), n_tokens))
        return profile_length(model, samples, n_tokens, *rest, **more)

    def watched_loss(model, samples):
        validated.append((len(samples), len(samples[0].token_ids), hasattr(model, "moa")))
        return answer_loss(model, samples)

    monkeypatch.setattr(pipeline, "profile_length", watched_profile)
    monkeypatch.setattr(pipeline, "answer_loss", watched_loss)
    found = dry_run(str(tiny_folder), SETTINGS)
    assert profiled == [(1, 128)]
    assert [(count, sparse) for count, _, sparse in validated] == [(1, False), (1, True)]
    assert all(128 < length <= 160 for _, length, _ in validated)
    steps = [(step.name, step.length_tokens) for step in found.steps]
    assert steps == [("answers", 128), ("profile", 128), ("validate dense", 160), ("validate plan", 160)]
    assert all(step.measured_s > 0 for step in found.steps)
    assert found.steps[0].predicted_s is None
    assert all(step.predicted_s > 0 and step.predicted_bytes > 0 for step in found.steps[1:])
    assert found.whole_s == pytest.approx(sum(step.whole_s for step in found.steps))
    assert "question" in found.text


def test_the_whole_run_is_scaled_from_the_measurement(tiny_folder: Path) -> None:
    predicted = estimate_compress(str(tiny_folder), SETTINGS)
    first, second, third = (replace(at, time_s=s) for at, s in zip(predicted.lengths, (6.0, 18.0, 24.0), strict=True))
    predicted = replace(predicted, lengths=(first, second, third))

    def step(name: str, n_tokens: int) -> module.Step:
        return module._step(_Taken(name, n_tokens, 2.0, 5), predicted, SETTINGS)

    assert step("answers", 128).whole_s == pytest.approx(2.0 * (6 * (64 + 128) + 3 * 160) / 128)
    profile = step("profile", 128)
    assert profile.predicted_s == pytest.approx(3.0)  # 18 s for 6 texts
    assert profile.whole_s == pytest.approx(2.0 * 6 * (1 + 6 / 18))  # the shorter length takes a third
    dense, plan = step("validate dense", 160), step("validate plan", 160)
    assert dense.predicted_s == plan.predicted_s == pytest.approx(24.0 / 3 / 4)  # 3 texts; dense and 3 candidates
    assert (dense.whole_s, plan.whole_s) == (pytest.approx(6.0), pytest.approx(18.0))


def test_every_round_profiles_again(tiny_folder: Path) -> None:
    predicted = estimate_compress(str(tiny_folder), SETTINGS)
    once, thrice = (
        module._step(_Taken("profile", 128, 2.0, 5), predicted, replace(SETTINGS, rounds=rounds)) for rounds in (1, 3)
    )
    assert thrice.whole_s == pytest.approx(3 * once.whole_s)
    assert thrice.predicted_s == pytest.approx(once.predicted_s / 3)  # of a prediction for all rounds


def test_the_prediction_is_for_the_dtype_that_is_loaded(tiny_folder: Path) -> None:
    found = dry_run(str(tiny_folder), SETTINGS, dtype="bfloat16").estimate
    plain = estimate_compress(str(tiny_folder), SETTINGS)
    assert (found.dtype, plain.dtype) == ("bfloat16", "float32")
    assert found.weight_bytes == plain.weight_bytes / 2
    assert found.lengths[0].peak_bytes < plain.lengths[0].peak_bytes
    with pytest.raises(UsageError, match="--dtype must be auto or one of"):
        dry_run(str(tiny_folder), SETTINGS, dtype="bf16")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak memory")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process's memory, not the GPU's")
def test_the_peak_is_that_of_the_step_alone() -> None:
    meter = _Meter(lambda stage, done, total: None)
    for name, size in (("small", 8), ("large", 256), ("small again", 8)):
        with meter.step(name, 1):
            block = torch.zeros(size * MIB, dtype=torch.uint8)
            del block
        gc.collect()
    small, large, again = (taken.peak_bytes for taken in meter.taken)
    assert 240 * MIB < large - small < 272 * MIB
    assert large - again > 240 * MIB


def test_a_step_that_runs_out_of_memory_is_named(tiny_folder: Path, monkeypatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline, "profile_length", short)
    with pytest.raises(ResourceError, match=r"profile.*128.*out of memory; try a shorter length"):
        dry_run(str(tiny_folder), SETTINGS)


def test_what_stops_a_run_stops_a_dry_run(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="context of 2048"):
        dry_run(str(tiny_folder), replace(SETTINGS, validate_length_tokens=4096))
