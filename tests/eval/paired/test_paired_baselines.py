"""Baselines have the plan's KV bytes at every length, say what they are, and say so where they cannot."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.errors import MoaError, ProfileError, UsageError
from moa.eval.paired.baselines import PLANS, baseline_ways, profile_beside
from moa.eval.paired.markdown import to_markdown
from moa.eval.paired.run import Way, run_paired
from moa.eval.paired.settings import EvalSettings
from moa.eval.paired.tasks import load_tasks
from moa.eval.paired.view import View
from moa.integrations.presses import INSTALL
from moa.plan import Calibration, Plan
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.sweep import SpanGrid

LENGTHS = (200, 300)
needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason=f"kvpress is not installed; {INSTALL}")


@pytest.fixture
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


@pytest.fixture
def elastic(tiny_plan):
    """Another density at every length."""
    rules = (((0, 0.5), (20, 0.125)), ((0, 1.0), (40, 0.0)))
    return Plan(model=tiny_plan.model, rules=rules, sink_tokens=4, min_span_tokens=16)


@pytest.fixture
def profile(elastic, tmp_path):
    """The second layer's first head loses most."""
    grid = SpanGrid.for_length(256, 4, 16)
    losses = np.zeros((2, 2, len(grid.position_edges) - 1, len(grid.spans_tokens)))
    losses[:, :, :, :-1] = np.array([[1.0, 2.0], [9.0, 3.0]])[:, :, None, None]
    calibration = Calibration(
        dataset="made-up", dataset_sha256="0", samples_per_length=2, lengths_tokens=(256,), seed=0,
        estimator="joint", supervision="model",
    )  # fmt: skip
    Profile(elastic.model, calibration, 4, 16, (LengthProfile(256, grid, losses, ("torch",)),)).save(
        tmp_path / "profile.safetensors"
    )
    return tmp_path / "profile.safetensors"


def evaluate(model, folder, ways, tasks=("moa_demo_multikey",)):
    settings = EvalSettings(str(folder), tasks, LENGTHS, num_samples=2)
    return run_paired(model, AutoTokenizer.from_pretrained(folder), load_tasks(settings, str(folder)), settings, ways)


def test_every_plan_baseline_has_the_plans_bytes_at_every_length(model, elastic, profile):
    ours = Way.under(elastic).kv(model, LENGTHS).sizes
    assert ours[0].ratio != ours[1].ratio
    for way in baseline_ways([*PLANS, "dense"], elastic, model, LENGTHS, profile=profile):
        sizes = way.kv(model, LENGTHS).sizes
        assert way.equal_to == "moa"
        for size, wanted in zip(sizes, ours, strict=True):
            assert 0.96 * wanted.kv_bytes <= size.kv_bytes <= wanted.kv_bytes, way.name  # texts of 200 tokens: 2 a head
        if way.name != "pyramid":
            assert [abs(s.kv_bytes / w.kv_bytes - 1) < 0.02 for s, w in zip(sizes, ours, strict=True)] == [True, True]


def test_streamingllm_is_one_window_for_the_whole_text(model, elastic):
    streaming, uniform = baseline_ways(["streamingllm", "uniform"], elastic, model, LENGTHS)
    assert (streaming.plan.length_mode, uniform.plan.length_mode) == ("pinned", "running")
    assert streaming.plan.distinct_rules == uniform.plan.distinct_rules == 1
    assert streaming.settings["tokens"] == "; ".join(
        f"{int(streaming.plan.span_rules.span(n)[0, 0])} of {n}" for n in LENGTHS
    )


def test_duo_makes_the_heads_dense_that_lose_most(model, elastic, profile):
    (way,) = baseline_ways(["duo"], elastic, model, LENGTHS, profile=profile)
    rules = [rule for layer in way.plan.rules for rule in layer]
    assert [rule == (0, 1.0) for rule in rules] == [False, False, True, False]
    assert way.settings["dense heads"].startswith("1 of 4 KV heads, those whose predicted loss is the largest")


def test_the_profile_lies_beside_the_plan(profile, elastic, tmp_path):
    elastic.save(tmp_path / "plan.json")
    assert profile_beside(str(tmp_path)) == profile_beside(str(tmp_path / "plan.json")) == profile
    assert profile_beside("organisation/plan") is None


def test_what_cannot_be_compared_is_said(model, elastic, profile, tiny_plan):
    with pytest.raises(UsageError, match="did you mean 'streamingllm'"):
        baseline_ways(["streaminglm"], elastic, model, LENGTHS)
    with pytest.raises(UsageError, match=r"no profile\.safetensors beside the plan; name one with --profile"):
        baseline_ways(["duo"], elastic, model, LENGTHS)
    other = Plan(model=elastic.model.model_copy(update={"fingerprint": "f"}), rules=elastic.rules)
    with pytest.raises(ProfileError, match="fingerprint"):
        baseline_ways(["duo"], other, model, LENGTHS, profile=profile)


def test_the_report_has_all_of_them(model, elastic, profile, tiny_folder):
    ways = [Way.under(elastic), *baseline_ways(["streamingllm", "duo"], elastic, model, LENGTHS, profile=profile)]
    report = evaluate(model, tiny_folder, ways).report
    assert [variant.name for variant in report.variants] == ["dense", "moa", "streamingllm", "duo"]
    assert {d.variant for d in report.differences} == {"moa", "streamingllm", "duo"}
    assert report.problems() == ()
    assert "length_mode pinned" in to_markdown(View(report))


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is installed")
def test_without_kvpress_it_says_how_to_get_it(model, elastic):
    with pytest.raises(MoaError, match="kvpress is not installed; run: pip install"):
        baseline_ways(["kvpress:snapkv"], elastic, model, LENGTHS)


@needs_kvpress
@pytest.mark.parametrize(("name", "saves"), [("h2o", True), ("streaming-llm", True), ("adakv_knorm", False)])
def test_presses_have_the_plans_bytes(name, saves, model, elastic, tiny_folder):
    ways = [Way.under(elastic), *baseline_ways([f"kvpress:{name}"], elastic, model, LENGTHS)]
    outcome = evaluate(model, tiny_folder, ways, ("moa_demo_multikey", "moa_demo_perplexity"))
    _, ours, press = outcome.report.variants
    assert press.name == f"kvpress-{name}"
    assert press.saves_memory == saves
    assert [size.kv_bytes for size in press.kv] == pytest.approx([size.kv_bytes for size in ours.kv], rel=0.02)
    assert outcome.report.problems() == ()
    assert "more KV than the plan at a text's end" in press.settings["answers"]  # perplexity's is half a text
    assert press.settings["compression_ratio"] == "1 - the plan's density, prompt by prompt"
    assert ("like H2O" in press.settings.get("selection", "")) == (name == "h2o")
    assert (ours.attention, press.attention) == ("torch", "sdpa")


@needs_kvpress
def test_a_press_that_keeps_all_says_what_dense_says(model, tiny_plan, tiny_folder):
    dense = Plan.uniform(tiny_plan.model, 0, 1.0)
    report = evaluate(model, tiny_folder, baseline_ways(["kvpress:knorm"], dense, model, LENGTHS, equal_to="")).report
    for found in report.differences:
        assert found.difference == pytest.approx(0, abs=1e-5)


@needs_kvpress
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("snapvk", "did you mean 'snapkv'"),
        ("adakv", "press inside, as in kvpress:adakv_snapkv"),
        ("think", "takes no compression_ratio"),
        ("duo_attention", "takes no compression_ratio"),
        ("prefill_decoding", "evicts while an answer is written"),
        ("key_rerotation_knorm", "new positions"),
        ("finch", "delimiter"),
        ("composed", "more than a name can say: .*'presses'"),
        ("scorer", "made from"),
    ],
)
def test_presses_that_cannot_be_compared_say_why(name, reason, model, elastic):
    with pytest.raises(UsageError, match=reason):
        baseline_ways([f"kvpress:{name}"], elastic, model, LENGTHS)
