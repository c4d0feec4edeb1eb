"""`moa eval`: both results and their differences in a folder, exit codes, nothing from the network when told so."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moa import demo
from moa.cli.app import run
from moa.eval import harness

pytestmark = pytest.mark.usefixtures("quick_lm_eval")
ROOT = Path(__file__).resolve().parents[2]
DEMO_TASKS = [*harness.TASKS_FOLDER.glob("demo_*.yaml")]
SMALL = ["--tasks", "moa_demo_multikey,moa_demo_perplexity", "--lengths", "200,256", "--num-samples", "3"]


def test_both_results_and_their_differences(tiny_folder, plan_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["eval", str(tiny_folder), "--plan", str(plan_file), *SMALL, "-o", str(out), "--strict", "--log-samples"]
    command += ["--prefill-chunk", "64"]
    assert run([*command, "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report == json.loads((out / "eval.json").read_text())
    assert [d["samples"] for d in report["differences"]] == [3, 3, 3, 3]
    assert report["conditions"]["prefill_chunk_tokens"] == 64
    assert {path.parent.name for path in out.rglob("results_*.json")} == {"dense", "moa"}
    assert len([*out.rglob("samples_*.jsonl")]) == 4
    assert "\r" not in said.err  # no bars where there is no terminal
    assert "Metrics were not scored" not in said.err
    assert "evaluate: 2/2" in said.err
    assert run(command) == 2  # nothing is overwritten
    assert "--overwrite" in capsys.readouterr().err
    assert run([*command, "--overwrite"]) == 0
    assert "moa_demo_multikey" in capsys.readouterr().out


def test_baselines_stand_beside_the_plan(tiny_folder, plan_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["eval", str(tiny_folder), "--plan", plan_file, *SMALL, "-o", str(out), "--baseline"]
    assert run([*command, "duo"]) == 2  # before anything is evaluated
    assert "no profile.safetensors beside the plan" in capsys.readouterr().err
    assert run([*command, "streamingllm,pyramid", "--baseline", "uniform", "--strict"]) == 0
    said = capsys.readouterr()
    assert "evaluate: 5/5" in said.err
    report = json.loads((out / "eval.json").read_text())
    assert [v["name"] for v in report["variants"]] == ["dense", "moa", "streamingllm", "pyramid", "uniform"]
    assert [v["equal_to"] for v in report["variants"]] == ["", "", "moa", "moa", "moa"]


def test_auto_is_a_batch_size(tiny_folder, plan_file, tmp_path, capsys):
    """The numbers are those of any other."""
    found = []
    for size in ("1", "auto", "auto:2", "3"):
        command = ["eval", str(tiny_folder), "--plan", str(plan_file), *SMALL, "--batch-size", size, "--strict"]
        assert run([*command, "-o", str(tmp_path / size.replace(":", "-")), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["conditions"]["batch_size"] == size
        found.append([sample["score"] for scores in report["scores"] for sample in scores["samples"]])
    assert all(each == pytest.approx(found[0], abs=1e-4) for each in found)


@pytest.mark.parametrize(
    ("more", "message"),
    [([], "unpaired"), (["--limit", "1"], "smoke test"), (["--max-length", "220"], "truncated to 220")],
)
def test_strict_fails_after_writing_the_report(more, message, tiny_folder, plan_file, tmp_path, capsys):
    paired = ["--plan", str(plan_file)] if more else []
    command = ["eval", str(tiny_folder), *paired, *SMALL, *more, "-o", str(tmp_path / "out")]
    assert run([*command, "--strict"]) == 1
    assert message in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["problems"]
    assert run([*command, "--overwrite"]) == 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-folder/here/x"], 3, "no such folder"),
        (["demo", "--lengths", "a"], 2, "--lengths"),
        (["demo", "--tasks", "moa_demo_singel"], 2, "did you mean 'moa_demo_single'"),
        (["demo", "--tasks", "moa_passkey"], 3, "moa_demo_"),
        (["demo", "--plan", "none.json"], 3, "none.json"),
        (["demo", "--baseline", "streamingllm"], 2, "say with --plan whose"),
        (["demo", "--text-file", "none.txt"], 3, "none.txt"),
        (["demo", "--batch-size", "0"], 2, "--batch-size"),
        (["demo", "--dtype", "float23"], 2, "--dtype"),
        (["demo", "--chat-template", "maybe"], 2, "--chat-template"),
    ],
)
def test_what_is_wrong_is_said(arguments, code, message, tmp_path, capsys):
    assert run(["eval", *arguments, "-o", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err


def test_help_and_missing_lm_eval(capsys, monkeypatch):
    assert run(["eval", "--help"]) == 0
    assert "prefetch" in capsys.readouterr().out
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert run(["eval", "demo"]) == 1
    assert "pip install 'moa[eval]'" in capsys.readouterr().err


def in_a_process(command, tmp_path, *before, **environment):
    cleared = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    given = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **environment}
    command = [*before, sys.executable, "-m", "moa", *command]
    return subprocess.run(command, cwd=ROOT, env={**cleared, **given}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_prefetched_it_needs_no_network(tiny_folder, plan_file, tmp_path, capsys, without_network):
    """With the same options, all is there; `--offline` itself reaches for nothing, here where there is nothing."""
    made = ["--tasks", "moa_demo_multikey", "--lengths", "200", "--num-samples", "2"]
    assert run(["eval", "prefetch", str(tiny_folder), *made]) == 0
    assert "1 tasks with 2 samples are here: moa_demo_multikey" in capsys.readouterr().out
    before = sorted((tmp_path / "cache" / "moa").rglob("*.json"))
    command = [
        "eval",
        str(tiny_folder),
        "--plan",
        str(plan_file),
        *made,
        "-o",
        str(tmp_path / "out"),
        "--offline",
        "--strict",
    ]
    done = in_a_process(command, tmp_path, *without_network)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "cache" / "moa").rglob("*.json")) == before != []


@pytest.mark.slow
def test_the_demo_is_evaluated_offline_where_there_is_no_network(tmp_path, without_network):
    """The whole of it, plan and tasks as they ship, with nothing in any cache; without --offline the hub is no help."""
    made = ["--lengths", "256", "--num-samples", "2", "-o", str(tmp_path / "out"), "--strict"]
    command = ["eval", "demo", "--plan", str(demo.MODEL_FOLDER), *made]
    done = in_a_process([*command, "--offline"], tmp_path, *without_network, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert {d["task"] for d in report["differences"]} == {path.stem.join(("moa_", "")) for path in DEMO_TASKS}
    assert report["problems"] == []
    assert not (tmp_path / "hub").exists()


REACHING = """
task: reaching
custom_dataset: !function reaching.data
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_offline_refuses_whoever_reaches_out(tiny_folder, tmp_path):
    """A task that opens a connection by itself, as some of lm-eval's do; a server on this machine would have answered."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "reaching.yaml").write_text(REACHING)
    (folder / "reaching.py").write_text(
        "import socket\ndef data(**given):\n    socket.create_connection(('192.0.2.1', 80), timeout=0.1)\n"
    )
    command = [
        "eval",
        str(tiny_folder),
        "--tasks",
        "reaching",
        "--include-path",
        str(folder),
        "-o",
        str(tmp_path / "out"),
    ]
    done = in_a_process([*command, "--offline"], tmp_path)
    assert done.returncode == 3
    assert "reaching: its data cannot be had: --offline, and 192.0.2.1 was to be reached" in done.stderr
    assert "moa eval prefetch" in done.stderr


def test_this_machine_may_be_reached_offline():
    from moa.eval.offline import NetworkRefused, offline

    server = socket.create_server(("127.0.0.1", 0))
    with offline():
        socket.create_connection(server.getsockname()).close()
        for reach in (lambda: socket.getaddrinfo("example.org", 80), lambda: socket.gethostbyname("example.org")):
            with pytest.raises(NetworkRefused, match=r"example.org"):
                reach()
    server.close()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_folder, plan_file, tmp_path):
    """Also where the samples do not split evenly, and with samples that are cut on one process only."""
    command = ["eval", str(tiny_folder), "--plan", str(plan_file), *SMALL]
    command += ["--lengths", "200,256,300", "--max-length", "280"]
    alone = in_a_process([*command, "-o", str(tmp_path / "one")], tmp_path)
    assert alone.returncode == 0, alone.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "moa"]
    given = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command, "-o", str(tmp_path / "two")],
        cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("one", "two"))
    assert (one["conditions"]["processes"], two["conditions"]["processes"]) == (1, 2)
    assert two["scores"] == one["scores"]
    assert two["differences"] == one["differences"]
    assert two["truncated"] == one["truncated"] > 0
    one, two = (next((tmp_path / name / "lm_eval" / "moa").glob("results_*.json")) for name in ("one", "two"))
    one, two = (json.loads(path.read_text())["results"]["moa_demo_perplexity"] for path in (one, two))
    assert two == {name: pytest.approx(value) if isinstance(value, float) else value for name, value in one.items()}


WITHOUT_THEIRS = """
import sys
from functools import partialmethod
from lm_eval.tasks import TaskManager
from moa.cli.app import run
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_of_lm_evals_command_find_what_one_finds(tiny_folder, plan_file, tmp_path):
    """Stock lm-eval would do the whole task in each of them, on a CPU; here they share its samples."""
    arguments = f"pretrained={tiny_folder},plan={plan_file},max_length=250"
    command = ["lm-eval", "run", "--model", "moa", "--model_args", arguments]
    command += ["--tasks", "moa_demo_multikey,moa_demo_perplexity", "--log_samples"]
    command += ["--metadata", '{"max_seq_lengths": [200, 300], "num_samples": 3}', "--output_path"]
    (tmp_path / "quick.py").write_text(WITHOUT_THEIRS)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(tmp_path / "quick.py")]
    assert run([*command, str(tmp_path / "one")]) == 0
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launch, *command, str(tmp_path / "two")],
        cwd=ROOT, env=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (lm_eval_files(tmp_path / name) for name in ("one", "two"))
    assert one[1] == two[1] == [[0, 1, 2, 3, 4, 5]] * 2
    for task, metrics in one[0]["results"].items():
        for name, value in metrics.items():
            if "stderr" not in name:  # drawn at random
                same = pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
                assert two[0]["results"][task][name] == same, (task, name)
    counted = [found["config"]["moa"]["truncated_requests"] for found, _ in (one, two)]
    assert counted == [6, 6]


def lm_eval_files(folder):
    """The results, and which samples were logged, task by task."""
    (path,) = folder.rglob("results_*.json")
    logged = [each.read_text().splitlines() for each in sorted(path.parent.glob("samples_*.jsonl"))]
    return json.loads(path.read_text()), [sorted(json.loads(line)["doc_id"] for line in lines) for lines in logged]
