"""`moa bench serve` at given rates: what it prints and writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from moa.cli.app import run

SMALL = ["--num-prompts", "3", "--prompt-tokens", "20:30", "--output-tokens", "3", "--turns", "1"]


@pytest.fixture
def demo_plan(tmp_path: Path) -> str:
    from moa import demo
    from moa.hf.load import load_model
    from moa.hf.shape import model_shape
    from moa.plan import Plan

    place = tmp_path / "plan.json"
    Plan.uniform(model_shape(load_model(demo.resolve("demo"))), 0, 0.25).save(place)
    return str(place)


def test_policies_and_a_plan_at_two_rates(tmp_path: Path, demo_plan: str, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    words = ["demo", "-o", str(out), "--plan", demo_plan, "--policies", "sarathi,orca", "--request-rate", "inf,50"]
    typed = ["bench", "serve", *words, *SMALL, "--goodput", "ttft:60000", "--save-detailed"]
    monkeypatch.setattr("sys.argv", ["moa", *typed])
    assert run(typed) == 0
    printed = capsys.readouterr().out
    assert printed.count(" Serving Benchmark Result ") == 6
    assert printed.splitlines()[0] == "sarathi"
    told = json.loads((out / "serve.json").read_text())
    assert [(keys["moa"]["subject"], keys["request_rate"]) for keys in told["runs"]] == [
        (name, rate) for name in ("sarathi", "orca", "sarathi, plan") for rate in ("inf", 50.0)
    ]
    for keys in told["runs"]:
        assert keys["completed"] == 3
        assert keys["total_output_tokens"] == 9
        assert keys["request_goodput"] == keys["request_throughput"]
        assert [len(gaps) for gaps in keys["itls"]] == [2, 2, 2]
        assert keys["moa"]["plan"] == ("dense" if keys["moa"]["subject"] != "sarathi, plan" else told["moa"]["plan"])
    rows = list(csv.DictReader((out / "serve.csv").read_text().splitlines()))
    assert [row["subject"] for row in rows] == [keys["moa"]["subject"] for keys in told["runs"]]
    page = (out / "README.md").read_text()
    assert "--request-rate inf,50" in page
    assert "goodput /s" in page
    assert str(tmp_path) not in page
    assert run(["bench", "serve", *words]) == 2  # nothing is written over


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--request-rate", "fast"], "--request-rate takes numbers"),
        (["--request-rate", "1", "--prompt-tokens", "many"], "MEDIAN"),
        (["--request-rate", "1"], "name it"),
        (["--plan", "x"], "one model"),
        (["demo", "--policies", "sarathy"], "sarathi"),
        (["--base-url", "127.0.0.1"], "--base-url must look like"),
        (["demo", "--base-url", "http://127.0.0.1:9", "--plan", "x"], "plan of its own"),
        (["demo", "--request-rate", "1", "--goodput", "speed:3"], "goodput"),
    ],
)
def test_usage_errors(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    assert run(["bench", "serve", "-o", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
