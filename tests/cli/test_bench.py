"""`moa bench` leaves what others wrote alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa.cli.app import run


@pytest.mark.parametrize("name", ["profile", "optimize", "apply", "serve"])
def test_a_page_that_is_there_is_not_written_over(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("moa.eval.bench_profile.bench_costs", lambda *_: pytest.fail("measured all the same"))
    monkeypatch.setattr("moa.eval.bench_optimize.bench_optimize", lambda *_: pytest.fail("measured all the same"))
    monkeypatch.setattr("moa.eval.bench_apply.bench_apply", lambda *_: pytest.fail("measured all the same"))
    monkeypatch.setattr("moa.eval.serving.bench_serve.bench_serve", lambda *_: pytest.fail("measured all the same"))
    (tmp_path / "README.md").write_text("mine")
    assert run(["bench", name, "-o", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_is_told_of_a_gpu_run_names_no_place(tmp_path: Path, monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setattr("moa.eval.gpu.run.bench_gpu", lambda settings, **_: asked.append(settings) or [])
    typed = ["bench", "kernels", "-o", str(tmp_path / "out"), "--plan", f"Llama-3-8B={tmp_path / 'plan.json'}"]
    monkeypatch.setattr("sys.argv", ["moa", *typed])
    assert run(typed) == 0
    assert [settings.command for settings in asked] == ["moa bench kernels -o out --plan Llama-3-8B=plan.json"]
    assert asked[0].plans == (("Llama-3-8B", tmp_path / "plan.json"),)
