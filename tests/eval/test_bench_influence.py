"""The influence benchmark end to end on a tiny model, and its statistics."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace

import pytest

from moa.cli.app import run
from moa.eval import bench_influence, conditions
from moa.eval.bench_influence import AT_BUDGET, BASE, ORACLE, ROUNDS, BenchSettings, bench_model
from moa.eval.influence_report import accuracies, mean_and_half, write_report
from moa.eval.records import RecallTask
from moa.hf.shape import model_shape
from moa.plan import Plan
from moa.stages import Workspace

SMALL = BenchSettings(
    n_tokens=128,
    densities=(0.5,),
    seeds=(0, 1),
    num_samples=2,
    effect_texts=2,
    effect_spans=(16, 64),
    variants=("moa", BASE, AT_BUDGET),
)


@pytest.fixture
def few_questions(monkeypatch):
    monkeypatch.setattr(
        bench_influence, "QUESTIONS", RecallTask(families=("single", "multikey"), single_texts=1, texts_per_family=1)
    )


def test_every_method_is_measured_at_every_density(model, tokenizer, tmp_path, few_questions):
    result = bench_model(model, tokenizer, "tiny", SMALL, Workspace.open(tmp_path, resume=False, overwrite=False))
    methods = {row.method for row in result.accuracy}
    assert methods == {*SMALL.variants, *bench_influence.FIXED, "duo", ROUNDS, ORACLE}
    for method in methods:
        seeds = 1 if method in (*bench_influence.FIXED, ORACLE) else 2
        assert [len(accuracies(result, method, d)) for d in SMALL.densities] == [seeds]
    assert all(row.density <= row.density_budget + 1e-9 for row in result.accuracy)
    assert {(row.method, row.seed) for row in result.fidelity} >= {(BASE, 0), ("moa", 1)}
    write_report([result], tmp_path / "report", ["a condition"])
    with (tmp_path / "report" / "accuracy.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1 + len(result.accuracy)
    page = (tmp_path / "report" / "README.md").read_text()
    assert "a condition" in page
    assert f"| {BASE}" in page
    assert (tmp_path / "report" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_measures_nothing_again(model, tokenizer, tmp_path, few_questions, monkeypatch):
    settings = replace(SMALL, seeds=(0,), rounds=False, variants=("moa", BASE))
    first = bench_model(model, tokenizer, "tiny", settings, Workspace.open(tmp_path, resume=False, overwrite=False))
    for name in ("recall", "profile_length", "measure_effects", "oracle_plans"):
        monkeypatch.delattr(bench_influence, name)
    again = bench_model(model, tokenizer, "tiny", settings, Workspace.open(tmp_path, resume=True, overwrite=False))
    assert again.accuracy == first.accuracy


class StoppedError(Exception):
    """Raised where a measurement would begin."""


@pytest.mark.parametrize(
    ("unit", "measured", "change"),
    [
        ("effects", "measure_effects", {"effect_spans": (16, 32)}),
        ("effects", "measure_effects", {"sink_tokens": 4}),
        ("effects", "measure_effects", {"min_span_tokens": 24}),
        ("effects", "measure_effects", {"effect_texts": 1}),
        ("profile", "profile_length", {"min_span_tokens": 24}),
        ("profile", "profile_length", {"num_samples": 3}),
        ("recall", "recall", {"min_span_tokens": 24}),
        ("oracle", "oracle_plans", {"sink_tokens": 4}),
        *(
            (unit, measured, change)
            for unit, measured in (("effects", "measure_effects"), ("profile", "profile_length"), ("recall", "recall"))
            for change in ("moa 0.0.1", "torch 0.0.1", "transformers 0.0.1", "code", "threads", "tokenizer")
        ),
    ],
)
def test_other_code_and_other_settings_measure_anew(
    model, tokenizer, tmp_path, few_questions, monkeypatch, unit, measured, change
):
    """What is the same is taken from the folder; a measurement of anything else begins."""
    settings = replace(SMALL, seeds=(0,), rounds=False, variants=(BASE,))
    workspace = Workspace.open(tmp_path, resume=False, overwrite=False)
    plan = Plan.uniform(model_shape(model), 0, 0.5, sink_tokens=8, min_span_tokens=16)

    def work(settings):
        setting = bench_influence._setting(model, tokenizer, model_shape(model), settings)
        bench = bench_influence._Bench(model, tokenizer, "tiny", model_shape(model), settings, workspace, setting)
        calls = {
            "effects": bench.effects,
            "profile": lambda: bench.profile(BASE, 0),
            "recall": lambda: bench.accuracy("uniform", None, 0.5, plan),
            "oracle": lambda: list(bench._oracle()),
        }
        return calls[unit]()

    work(settings)

    def stop(*arguments, **options):
        raise StoppedError

    monkeypatch.setattr(bench_influence, measured, stop)
    work(settings)
    if isinstance(change, dict):
        settings = replace(settings, **change)
    elif change == "code":
        monkeypatch.setattr(conditions, "code_digest", lambda: "other")
    elif change == "threads":
        monkeypatch.setattr(conditions.torch, "get_num_threads", lambda: 77)
    elif change == "tokenizer":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["quite-new"])
    else:
        name, other = change.split()
        true = conditions.version
        monkeypatch.setattr(conditions, "version", lambda asked: other if asked == name else true(asked))
    with pytest.raises(StoppedError):
        work(settings)


def test_intervals_are_students():
    assert mean_and_half([5.0]) == (5.0, 0.0)
    mean, half = mean_and_half([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_models_of_one_name_are_refused(tmp_path, capsys):
    assert run(["bench", "influence", "a/model", "b/model", "-o", str(tmp_path / "out")]) == 2
    assert "same one" in capsys.readouterr().err


def test_the_command_names_a_missing_model(tmp_path, capsys):
    assert run(["bench", "influence", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 3
    assert "none" in capsys.readouterr().err
