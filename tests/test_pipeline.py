"""`compress` from model to plan: budgets kept, the same bytes every time, however often it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa import pipeline
from moa.distributed import Team
from moa.errors import InfeasibleError, ModelError, ResourceError, UsageError
from moa.eval.scoring import answer_loss
from moa.hf import apply
from moa.hf.load import load_model, load_tokenizer
from moa.optimize.budget import kv_gib_budget
from moa.pipeline import check_lengths, compress
from moa.plan import ModelShape, load_plan
from moa.plan_card import plan_card
from moa.profile.artefact import Profile
from moa.profile.collect import profile_length
from moa.profile.supervise import supervise
from moa.profile.synthetic import synthetic_samples
from moa.settings import CompressSettings
from moa.stages import Workspace

SETTINGS = CompressSettings(lengths_tokens=(128, 256), validate_length_tokens=512, num_samples=2, max_candidates=3)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PreTrainedModel:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_folder))


def at(folder: Path, **flags: bool) -> Workspace:
    return Workspace.open(folder, **{"resume": False, "overwrite": False, **flags})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0}, "--density must lie in"),
        ({"density": 2}, "--density must lie in"),
        ({"density": -0.5}, "--density must lie in"),
        ({"density": float("nan")}, "--density must lie in"),
        ({"density": float("inf")}, "--density must lie in"),
        ({"lengths_tokens": ()}, "distinct and ascending"),
        ({"lengths_tokens": (256, 128)}, "distinct and ascending"),
        ({"lengths_tokens": (128, 128)}, "distinct and ascending"),
        ({"lengths_tokens": (63, 128)}, "at least 64 tokens, got 63"),
        ({"lengths_tokens": (-128, 128)}, "at least 64"),
        ({"validate_length_tokens": 256}, r"--validate-length \(256\) must exceed"),
        ({"validate_length_tokens": 0}, r"--validate-length \(0\) must exceed"),
        ({"validate_length_tokens": -1}, "must exceed"),
        ({"num_samples": 1}, "--num-samples must be at least 2"),
        ({"estimator": "bogus"}, "--estimator must be one of joint, rows, moa, got 'bogus'"),
        ({"supervision": "bogus"}, "--supervision must be one of model, reference"),
        ({"max_rules_per_layer": 0}, "--max-rules-per-layer must be at least 1"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"max_candidates": 0}, "--max-candidates must be at least 1"),
        ({"sink_tokens": -1}, "--sink-tokens must be at least 0"),
        ({"min_span_tokens": 0}, "--min-span-tokens must be at least 1"),
        ({"sink_tokens": 16, "min_span_tokens": 16}, "must exceed --sink-tokens"),
    ],
)
def test_settings_that_cannot_be_meant(wrong, message) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SETTINGS, **wrong)


@pytest.mark.parametrize("density", [0.05, 0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shortest", [512, 2048, 100_000])
def test_fitted_spans_leave_room_in_the_budget(density, shortest) -> None:
    settings = CompressSettings(density=density, lengths_tokens=(shortest,))
    sink, least = settings.spans
    assert 0 <= sink < least
    assert least == 16 or least <= density * shortest / 4
    assert settings.unseen_tokens == 2 * shortest


def test_a_length_too_short_for_the_density_is_named() -> None:
    with pytest.raises(InfeasibleError, match=r"At 64 tokens, .* keeps 16 tokens, a density of 0\.25"):
        CompressSettings(density=0.125, lengths_tokens=(64,))


def test_short_memory_turns_checkpointing_on_and_changes_no_plan(model, tokenizer, tmp_path, monkeypatch) -> None:
    want = compress(model, tokenizer, SETTINGS, at(tmp_path / "plain")).plan
    twin = pipeline.footprint.meta_twin(model)
    whole, less = (pipeline.footprint.profile_bytes(twin, 256, SETTINGS.spans, on) for on in (False, True))
    asked = []

    def spy(*args: object, checkpointing: bool, **options: object) -> object:
        asked.append(checkpointing)
        return profile_length(*args, checkpointing=checkpointing, **options)

    monkeypatch.setattr(pipeline, "profile_length", spy)
    monkeypatch.setattr(pipeline.footprint, "available_bytes", lambda model: (whole + less) // 2)
    assert compress(model, tokenizer, SETTINGS, at(tmp_path / "short")).plan == want
    assert asked == [True, True]


def test_the_plan_says_how_its_influence_was_computed(model, tokenizer, tmp_path) -> None:
    plan = compress(model, tokenizer, SETTINGS, at(tmp_path)).plan
    assert (plan.calibration.influence_backends, plan.calibration.mixed_lengths) == (("torch",), False)
    assert Profile.load(tmp_path / "profile.safetensors").lengths[0].backends == ("torch",)
    assert "`128, 256, texts of just these`" in plan_card(plan)
    mixed = pipeline.TextSource.open(tokenizer, replace(SETTINGS, mixed_lengths=True))
    assert mixed.record({256: mixed.samples(256, 2, 0)}).mixed_lengths


def test_another_attention_is_another_result(model, tokenizer, tmp_path, monkeypatch) -> None:
    """What other kernels computed is not taken up again: neither the influence, nor answers and losses."""

    def units() -> dict[str, int]:
        names = [path.name.rpartition("-")[0] for path in (tmp_path / "stages").iterdir()]
        return {name: names.count(name) for name in set(names)}

    compress(model, tokenizer, SETTINGS, at(tmp_path))
    first = units()
    monkeypatch.setattr(pipeline, "backend_names", lambda *arguments: ("triton",))
    compress(model, tokenizer, SETTINGS, at(tmp_path, resume=True))
    assert units() == {**first, "profile-128": 2, "profile-256": 2}
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        compress(model, tokenizer, SETTINGS, at(tmp_path, resume=True))
    finally:
        model.set_attn_implementation(before)
    assert units()["answers-128"] == 2 * first["answers-128"]
    assert units()["profile-128"] == 3
    assert units()["validate"] == 2 * first["validate"]


def test_a_second_round_profiles_at_the_plan_just_found(model, tokenizer, tmp_path, monkeypatch) -> None:
    first = compress(model, tokenizer, SETTINGS, at(tmp_path)).candidates[0]
    references = []

    def spy(model, texts, n, sink, least, influence, on_sample, reference, **options: object) -> object:
        references.append((n, influence.attenuations, reference))
        return profile_length(model, texts, n, sink, least, influence, on_sample, reference, **options)

    monkeypatch.setattr(pipeline, "profile_length", spy)
    twice = compress(model, tokenizer, replace(SETTINGS, rounds=2), at(tmp_path, resume=True)).plan
    # the first round is the one that was there
    assert [(n, lambdas) for n, lambdas, _ in references] == [(128, (0.05,)), (256, (0.05,))]
    for _, _, reference in references:
        assert (reference.span(256) == first.span_rules.span(256)).all()
    assert twice.calibration.rounds == 2


def test_memory_that_cannot_do_is_said_before_any_work(model, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline.footprint, "available_bytes", lambda model: 1000)
    with pytest.raises(ResourceError, match=r"profiling 256 tokens needs about .* are free"):
        compress(model, tokenizer, SETTINGS, at(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".safetensors")]


def test_memory_is_looked_at_when_all_have_loaded_and_none_works(model, tokenizer, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(Team, "wait", lambda team: seen.append("wait"))
    monkeypatch.setattr(pipeline.footprint, "available_bytes", lambda model: seen.append("look") or 1 << 40)
    monkeypatch.setattr(pipeline, "_calibration", lambda job: seen.append("work") or {}[0])
    with pytest.raises(KeyError):
        compress(model, tokenizer, SETTINGS, at(tmp_path))
    assert seen == ["wait", "look", "wait", "work"]


def test_lengths_beyond_the_models_context_are_refused(model) -> None:
    check_lengths(model, SETTINGS)
    with pytest.raises(UsageError, match=r"--validate-length 4096 exceeds the model's context of 2048"):
        check_lengths(model, replace(SETTINGS, validate_length_tokens=4096))


def test_a_plan_keeps_its_budget_and_says_what_it_costs(model, tokenizer, tmp_path: Path) -> None:
    heard = []
    workspace = Workspace.open(tmp_path, resume=False, overwrite=False, progress=lambda *a: heard.append(a))
    result = compress(model, tokenizer, SETTINGS, workspace, "tiny")
    plan = load_plan(tmp_path)
    assert plan == result.plan
    assert plan.model.name == "tiny"
    assert [n.length_tokens for n in plan.lengths] == [128, 256, 512]
    for n in plan.lengths:
        assert n.density_ratio == plan.span_rules.density_ratio(n.length_tokens) <= 0.5
    assert all(len(set(layer)) <= 4 for layer in plan.rules)
    assert plan.calibration is not None
    assert plan.calibration.lengths_tokens == (128, 256)
    assert plan.objective is not None
    assert plan.solver is not None
    # the recorded validation is what a fresh measurement gives
    texts = synthetic_samples(tokenizer, 512, 2, SETTINGS.seed + 1)
    texts = tuple(supervise(model, texts))
    assert plan.validation is not None
    assert plan.validation.dense_loss == pytest.approx(answer_loss(model, texts), rel=1e-6)
    with apply(model, plan):
        assert plan.validation.sparse_loss == pytest.approx(answer_loss(model, texts), rel=1e-6)
    assert plan.validation.sparse_loss == min(result.true_losses)
    assert plan.validation.candidates == len(result.true_losses) == len(result.candidates) <= 3
    assert Profile.load(tmp_path / "profile.safetensors").calibration == plan.calibration
    assert ("profile 128 tokens", 2, 2) in heard
    assert (tmp_path / "README.md").read_text() == plan_card(plan)
    # again from the finished units, and again from nothing: the same bytes
    files = {name: (tmp_path / name).read_bytes() for name in ("plan.json", "README.md", "profile.safetensors")}
    compress(model, tokenizer, SETTINGS, at(tmp_path, resume=True), "tiny")
    compress(model, tokenizer, SETTINGS, at(tmp_path / "new"), "tiny")
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
        assert (tmp_path / "new" / name).read_bytes() == content


@pytest.mark.parametrize("changes", [{"estimator": "moa"}, {"density": 1.0}, {"max_rules_per_layer": 1}])
def test_other_settings(model, tokenizer, tmp_path: Path, changes) -> None:
    settings = replace(SETTINGS, max_candidates=1, **changes)
    plan = compress(model, tokenizer, settings, at(tmp_path)).plan
    assert all(n.density_ratio <= settings.density for n in plan.lengths)
    assert all(len(set(layer)) <= settings.max_rules_per_layer for layer in plan.rules)
    if settings.density == 1:
        assert plan.validation.sparse_loss == pytest.approx(plan.validation.dense_loss, abs=1e-5)


def test_a_budget_that_no_plan_keeps() -> None:
    with pytest.raises(InfeasibleError, match=r"--density 0\.01: no plan keeps this\. At 128 tokens"):
        replace(SETTINGS, density=0.01)


def test_one_budget_at_a_time() -> None:
    shape = ModelShape(architecture="x", layers=2, heads=4, kv_heads=2, head_dim=8)
    budget = kv_gib_budget("0.0001220703125@2048", shape)
    assert replace(SETTINGS, density=0.25, budget=budget).budget_lengths == (128, 256, 512, 2048)
    with pytest.raises(UsageError, match="give one budget"):
        replace(SETTINGS, density=0.3, budget=budget)


def test_more_processes_than_texts_are_refused(model, tokenizer, tmp_path: Path, monkeypatch) -> None:
    settings = replace(SETTINGS, supervision="reference")  # nothing to exchange before
    monkeypatch.setattr(Team, "wait", lambda team: None)
    with pytest.raises(UsageError, match="3 processes cannot share 2 texts; start at most 2, or give more"):
        compress(model, tokenizer, settings, at(tmp_path), team=Team(world=3))


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer, tmp_path: Path) -> None:
    import copy

    other = copy.deepcopy(model)
    other.resize_token_embeddings(50)
    with pytest.raises(ModelError, match="the tokenizer files belong to another model"):
        compress(other, tokenizer, SETTINGS, at(tmp_path))


def test_a_model_whose_loss_is_no_number_is_refused(model, tokenizer, tmp_path: Path) -> None:
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        compress(broken, tokenizer, SETTINGS, at(tmp_path))


def test_texts_from_a_file(model, tokenizer, tmp_path: Path, caplog) -> None:
    words = "the brown dog follows the wild cat . " * 60
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"anna came {words[i:]}", "answer": "10 ."}) + "\n" for i in range(4))
    )
    settings = replace(SETTINGS, dataset=str(file), supervision="reference", max_candidates=1)
    with caplog.at_level("WARNING", logger="moa"):
        plan = compress(model, tokenizer, settings, at(tmp_path / "out")).plan
    assert plan.calibration.dataset == "texts.jsonl"
    for name in ("plan.json", "README.md", "profile.safetensors"):
        assert str(tmp_path).encode() not in (tmp_path / "out" / name).read_bytes()
    assert plan.calibration.supervision == "reference"
    assert "2 of 2 texts were cut to fit 128 tokens" in caplog.text


class Stop(Exception):
    """Ends a run once its texts are there."""


def test_the_model_s_answers_are_kept_by_all_that_decides_them(model, tokenizer, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "texts.jsonl"
    words = "the brown dog follows the wild cat . " * 60
    file.write_text("".join(json.dumps({"prompt": f"anna came {words[i:]}", "answer": "10"}) + "\n" for i in range(8)))
    settings = replace(SETTINGS, dataset=str(file), max_answer_tokens=4)

    def stop(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(pipeline, "_profile", stop)

    def answers(**changes: object) -> set[str]:
        with pytest.raises(Stop):
            compress(model, tokenizer, replace(settings, **changes), at(tmp_path / "out", resume=True))
        return {path.name for path in (tmp_path / "out/stages").glob("answers-*")}

    first = answers()
    assert len(first) == 2
    assert answers(density=0.25, estimator="moa") == first  # these come later
    changes = ({"max_answer_tokens": 5}, {"seed": 9}, {"num_samples": 3})
    assert [len(answers(**change)) for change in changes] == [4, 6, 8]
    monkeypatch.setattr(model.generation_config, "eos_token_id", 77)
    assert len(answers()) == 10
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }} then")
    assert len(answers()) == 12
    made = json.loads(min((tmp_path / "out/stages").glob("answers-128-*")).read_text())
    assert all(1 <= len(sample["answer_ids"]) <= 5 for sample in made)


OPTIONS = ["--lengths", "128,256", "--num-samples", "2", "--seed", "5"]


def start(folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moa", "compress", str(folder), "-o", str(out), *OPTIONS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # a shell starts background jobs with the interrupt ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - it does nothing else
    )


def units(out: Path) -> int:
    return len(list((out / "stages").glob("[!.]*"))) if (out / "stages").is_dir() else 0


def wait_for_units(process: subprocess.Popen[str], out: Path, wanted: int) -> None:
    limit = time.monotonic() + 120
    while units(out) < wanted and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    whole = start(tiny_folder, tmp_path / "whole")
    _, errors = whole.communicate(timeout=200)
    assert whole.returncode == 0, errors
    total, rng, killed = units(tmp_path / "whole"), random.Random(0), 0
    out = tmp_path / "killed"
    for share in (0.1, 0.4, 0.7):
        process = start(tiny_folder, out, *(["--resume"] if out.exists() else []))
        wait_for_units(process, out, int(share * total))
        time.sleep(rng.random() * 0.1)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert killed
    last = start(tiny_folder, out, "--resume")
    _, errors = last.communicate(timeout=200)
    assert last.returncode == 0, errors
    for name in ("plan.json", "profile.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (out / "stages").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole/stages").iterdir()
    )
    log = (out / "moa.log").read_text()
    assert "taken from" in log


@pytest.mark.slow
def test_an_interrupt_ends_with_130_and_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    """Sent to the whole process group, as a terminal does."""
    process = start(tiny_folder, tmp_path / "out", "--num-samples", "64")  # long enough to be still at it
    wait_for_units(process, tmp_path / "out", 2)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("moa:")]
    going_on = f"moa: finished units are kept in {tmp_path / 'out'}; to go on, run the command again with --resume"
    assert lines == [going_on, "moa: interrupted"]
    assert not (tmp_path / "out/plan.json").exists()
