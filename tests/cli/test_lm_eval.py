"""`moa lm-eval` is lm-eval's own command, with our model and tasks in it."""

from __future__ import annotations

import json

import pytest

from moa.cli.app import run
from moa.eval import harness
from moa.eval.longtext.families import FAMILIES

pytestmark = pytest.mark.usefixtures("quick_lm_eval")
THEIRS = """
task: their_task
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 2, until: []}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def their_folder(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": "the code of bahul is", "answer": str(i)}) for i in range(3)))
    (folder / "their_task.yaml").write_text(THEIRS.replace("FILE", str(data)))
    return folder


def test_run_takes_stock_flags(tiny_folder, their_folder, tmp_path, capsys):
    arguments = ["run", "--model", "moa", "--model_args", f"pretrained={tiny_folder},plan_backend=reference"]
    arguments += ["--tasks", "moa_demo_single,their_task", "--include_path", str(their_folder), "--limit", "2"]
    arguments += ["--metadata", '{"max_seq_lengths": [256, 300], "num_samples": 1}', "--batch_size", "2"]
    arguments += ["--output_path", str(tmp_path / "out"), "--log_samples", "--seed", "3", "--device", "cpu"]
    assert run(["lm-eval", *arguments]) == 0
    assert "moa_demo_single" in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert {"256,none", "300,none", "score,none"} <= {*results["results"]["moa_demo_single"]}
    assert results["results"]["their_task"]["exact_match,none"] == 0
    assert results["config"]["moa"]["attention"] == "sdpa"
    assert results["config"]["random_seed"] == 3
    assert len([*path.parent.glob("samples_*.jsonl")]) == 2


def test_all_other_stock_flags_work_under_a_plan(tiny_folder, plan_file, their_folder, tmp_path, capsys):
    """Twice, for the second time answers come from lm-eval's cache; what was cut is counted, whoever runs it."""
    out = tmp_path / "out"
    arguments = ["run", "-M", "moa", "-a", f"pretrained={tiny_folder}", f"plan={plan_file}", "max_length=40"]
    arguments += ["-t", "moa_demo_single", "their_task", "--include_path", str(their_folder), "--device", "cpu"]
    arguments += ["--metadata", '{"max_seq_lengths": [256], "num_samples": 2}', "-o", str(out), "-s", "--write_out"]
    arguments += ["-b", "auto:2", "--max_batch_size", "2", "--num_fewshot", "0", "--gen_kwargs", "temperature=0"]
    arguments += ["--show_config", "--verbosity", "ERROR", "--system_instruction", "anna"]
    arguments += ["--use_cache", str(tmp_path / "answers"), "--samples", '{"their_task": [0, 2]}']
    found = []
    for _ in range(2):
        assert run(["lm-eval", *arguments]) == 0
        assert "their_task" in capsys.readouterr().out
        path = max(out.rglob("results_*.json"))
        found.append(json.loads(path.read_text()))
        path.unlink()
    assert found[0]["results"] == found[1]["results"]
    ours = found[0]["config"]["moa"]
    assert (ours["attention"], ours["device"], ours["truncated_requests"]) == ("torch", "cpu", 2)
    assert found[0]["n-samples"]["their_task"]["effective"] == 2
    assert found[0]["configs"]["their_task"]["generation_kwargs"]["temperature"] == 0


def test_predictions_alone_are_kept(tiny_folder, their_folder, tmp_path, capsys):
    arguments = ["run", "--model", "moa", "--model_args", f"pretrained={tiny_folder}", "--tasks", "their_task"]
    arguments += ["--include_path", str(their_folder), "-o", str(tmp_path / "out"), "--predict_only"]
    assert run(["lm-eval", *arguments]) == 0, capsys.readouterr().err
    assert len([*(tmp_path / "out").rglob("samples_*.jsonl")]) == 1


def test_tasks_are_listed_and_valid(capsys):
    assert run(["lm-eval", "ls", "subtasks"]) == 0
    listed = capsys.readouterr().out
    assert all(f"moa_{name}" in listed for name in FAMILIES)
    assert run(["lm-eval", "validate", "--tasks", "moa_passkey,moa_vt"]) == 0
    assert "valid" in capsys.readouterr().out


def test_a_config_files_folder_is_not_forgotten(tiny_folder, their_folder, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: moa\nmodel_args: {{pretrained: {tiny_folder}}}\ntasks: [their_task]\ninclude_path: {their_folder}\n"
    )
    assert run(["lm-eval", "run", "--config", str(config)]) == 0
    assert "their_task" in capsys.readouterr().out


def test_help_is_lm_evals(capsys):
    assert run(["lm-eval", "run", "--help"]) == 0
    assert "--log_samples" in capsys.readouterr().out


def test_every_family_has_its_task():
    tasks = {path.stem for path in harness.TASKS_FOLDER.glob("*.yaml")}
    assert tasks == {*FAMILIES}


@pytest.mark.parametrize("command", [["lm-eval", "ls"]])
def test_without_lm_eval_it_says_how_to_install_it(command, monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert run(command) == 1
    assert "pip install 'moa[eval]'" in capsys.readouterr().err
