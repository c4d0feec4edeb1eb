"""`moa compress` and `moa estimate`: results on stdout, one line and an exit code for everything a user can do wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moa.cli import app as cli
from moa.cli.compress import _show_result
from moa.pipeline import Compressed
from moa.plan import ModelShape, Plan, SolverRecord, load_plan

SMALL = ["--lengths", "128,256", "--num-samples", "2"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit code, stdout, and stderr without progress."""

    def run_it(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, "\n".join(line for line in err.splitlines() if line.startswith("moa:") or "rror" in line)

    return run_it


@pytest.fixture
def refused(run: Run, tiny_folder: Path, tmp_path: Path) -> Callable[..., str]:
    """The message of a `moa compress` that must fail with `code` and leave no plan."""

    def refuse(code: int, *arguments: object, model: object = tiny_folder, out: Path | None = None) -> str:
        out = out or tmp_path / "out"
        got, stdout, message = run("compress", model, "-o", out, *SMALL, *arguments)
        assert got == code, message
        assert stdout == ""
        # before the error there may be a word on how to go on
        (message,) = [line for line in message.splitlines() if not line.startswith("moa: finished units are kept")]
        assert not (out / "plan.json").exists()
        return message.removeprefix("moa: error: ")

    return refuse


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize("command", ["compress", "estimate", "demo"])
def test_help_loads_nothing_heavy(command) -> None:
    code = (
        "import sys\nfrom moa.cli.app import run\n"
        f"assert run(['{command}', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'cvxpy', 'matplotlib'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: moa {command}" in done.stdout


def test_json_is_all_that_stdout_holds(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "moa", "compress", str(tiny_folder), "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run([*arguments, *SMALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    plan = load_plan(tmp_path / "out")
    assert result["sha256"] == plan.sha256
    assert result["plan"] == str(tmp_path / "out/plan.json")
    assert [at["length_tokens"] for at in result["lengths"]] == [128, 256, 512]
    assert result["validation"]["sparse_loss"] == min(result["true_losses"])
    assert result["budget"] is None
    assert set(result) == {"plan", "sha256", "lengths", "budget", "validation", "solver", "true_losses", "calibration"}
    assert "validate at 512 tokens" in done.stderr


def test_the_result_for_people(run, tiny_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL)
    assert code == 0
    plan = load_plan(tmp_path / "out")
    assert plan.sha256[:12] in out
    assert "Answer loss at 512 tokens (not profiled)" in out
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert saved["model"] == str(tiny_folder)
    assert saved["lengths"] == "128,256"
    assert "optimize: done" in (tmp_path / "out/moa.log").read_text()


def test_a_gap_is_said_as_a_share_of_the_plan_s_own_loss(tmp_path: Path, capsys) -> None:
    """With a bound of half its loss, the plan can be twice as bad as the best: "50 % above the least" would be wrong."""
    shape = ModelShape(architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=8)
    made = SolverRecord(name="greedy", status="feasible", milp_status="time_limit", bound=0.5, gap_ratio=0.5)
    plan = Plan.uniform(shape, 0, 0.5, solver=made)
    _show_result(Compressed(plan, (plan,), (1.0,), 0.5), tmp_path, json=False)
    assert "no plan's predicted loss is more than 50.00% lower" in capsys.readouterr().out


def test_missing_models(refused, tmp_path: Path) -> None:
    assert "no such folder" in refused(3, model=tmp_path / "none")
    assert "none" in refused(3, model="none")
    assert "File name too long" in refused(3, model="a" * 5000)
    (tmp_path / "empty").mkdir()
    assert "not a model folder: it has no config.json" in refused(3, model=tmp_path / "empty")


def test_weights_that_are_damaged(refused, copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:5000], b"", whole[:10] + b"x" * 30 + whole[40:], b"x" * 100):
        file.write_bytes(damaged)
        message = refused(3, model=copy)
        assert str(copy) in message
        assert "damaged or cut short" in message
    file.unlink()
    assert str(copy) in refused(3, model=copy)


def test_weights_that_are_incomplete_or_of_another_shape(refused, copy: Path) -> None:
    """transformers would fill them with random numbers."""
    file, name = copy / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(file)
    save_file({**weights, name: torch.zeros(3, 3)}, file, {"format": "pt"})
    assert f"{name} has shape [3, 3], the config wants [32, 32]" in refused(3, model=copy)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    assert f"1 weights are missing ({name})" in refused(3, model=copy)


@pytest.mark.parametrize("text", ["{", "", "[]", "\x00", "[" * 100_000])
def test_a_config_that_is_not_json(refused, copy: Path, text) -> None:
    (copy / "config.json").write_text(text)
    assert str(copy / "config.json") in refused(3, model=copy)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"model_type": "bogus"},
        {"model_type": "t5"},
        {"dtype": "float99"},
        {"hidden_act": "bogus"},
        {"rope_parameters": "x"},
        {"num_key_value_heads": 3},
    ],
)
def test_a_config_that_makes_no_model(refused, run, copy: Path, change) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    assert len(refused(3, model=copy)) > 20
    if "num_key_value_heads" not in change:
        code, out, message = run("estimate", copy, *SMALL)
        assert (code, out) == (3, "")
        assert str(copy) in message


def test_a_tokenizer_that_is_damaged_or_missing(refused, copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(3, model=copy)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer" in refused(3, model=copy)


@pytest.mark.parametrize("text", ["", "{bad", "[1]", '{"promt": "x"}', '{"prompt": "x"}', '{"prompt": "\\ud800"}'])
def test_data_that_cannot_be_used(refused, tmp_path: Path, text) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(text)
    assert str(file) in refused(3, "--dataset", file)


def test_data_that_is_not_there(refused, tmp_path: Path) -> None:
    message = refused(3, "--dataset", tmp_path / "none.jsonl")
    assert message.startswith(f"{tmp_path / 'none.jsonl'}: no such file; --dataset takes a JSON-lines or Parquet file")
    assert "cannot be loaded as a data set" in refused(3, "--dataset", tmp_path)
    assert "without network" in refused(3, "--dataset", "made-up-org/none")
    refused(3, "--dataset", tmp_path / "none.jsonl", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "--density must lie in (0, 1], got 0.0"),
        (["--density", "2"], "--density must lie in (0, 1], got 2.0"),
        (["--density", "nan"], "--density must lie in"),
        (["--density", "x"], "--density"),
        (["--estimator", "bogus"], "--estimator"),
        (["--supervision", "bogus"], "--supervision"),
        (["--lengths", "256,128"], "ascending"),
        (["--lengths", "10"], "at least 64"),
        (["--lengths", "1e3"], "--lengths must be whole numbers separated by commas, got '1e3'"),
        (["--lengths", ","], "--lengths"),
        (["--validate-length", "0"], "--validate-length (0) must exceed"),
        (["--validate-length", "100000"], "exceeds the model's context of 2048 tokens"),
        (["--num-samples", "1"], "--num-samples"),
        (["--max-rules-per-layer", "0"], "--max-rules-per-layer"),
        (["--sink-tokens", "-1"], "--sink-tokens"),
        (["--sink-tokens", "500"], "--sink-tokens"),
        (["--min-span-tokens", "0"], "--min-span-tokens"),
        (["--dtype", "bfloat61"], "did you mean 'bfloat16'"),
        (["--dtype", "int8"], "--dtype"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--chat-template", "on"], "the tokenizer has none"),
        (["--columns", "prompt=x"], "--columns says how to read a data set"),
        (["--dataset", "org/name", "--columns", "x"], "--columns takes"),
        (["--density", "0.5", "--kv-gib", "1@512"], "give one budget, got --density and --kv-gib"),
        (["--kv-gib", "1@512", "--decode-ms", "1@512", "--device", "h200"], "give one budget"),
        (["--decode-ms", "1@512"], "--decode-ms and --device go together"),
        (["--kv-gib", "1@512", "--device", "h200"], "--decode-ms and --device go together"),
        (["--decode-ms", "1@512", "--device", "h2000"], "did you mean 'h200'"),
        (["--kv-gib", "1"], "--kv-gib must be AMOUNT@CONTEXT"),
        (["--kv-bytes-per-token", "0"], "--kv-bytes-per-token must be a positive number"),
        (["--max-answer-tokens", "65"], "must leave half of the shortest length"),
    ],
)
def test_options_that_cannot_be_meant(refused, arguments, message) -> None:
    assert message in refused(2, *arguments)


def test_a_budget_that_cannot_be_kept_is_refused_before_any_work(refused, tmp_path: Path) -> None:
    message = refused(1, "--density", "0.01")
    assert "At 128 tokens, the tightest length" in message
    assert "least possible value is --density 0.125" in message
    # 2 layers x 2 KV heads x 8 dimensions x 4 bytes x 2: 256 bytes a token
    assert "least possible value is --kv-bytes-per-token 32.00" in refused(1, "--kv-bytes-per-token", "10")
    message = refused(1, "--decode-ms", "0.0000001@512x8", "--device", "h200")
    assert "without any attention a step of 8 sequences takes" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "option", "density", "lengths"),
    [
        (["--kv-bytes-per-token", "64"], "--kv-bytes-per-token 64", 0.25, [128, 256, 512]),
        # 128 KiB of 2048 tokens x 256 bytes
        (["--kv-gib", "0.0001220703125@2048"], "--kv-gib 0.00012207@2048x1", 0.25, [128, 256, 512, 2048]),
    ],
)
def test_a_budget_is_converted_echoed_and_kept(
    run, tiny_folder: Path, tmp_path: Path, arguments, option, density, lengths
) -> None:
    code, out, message = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, *arguments, "--json")
    assert code == 0, message
    said = f"{option} is a density of {density}"
    assert said in message
    assert said in (tmp_path / "out/moa.log").read_text()
    result, plan = json.loads(out), load_plan(tmp_path / "out")
    assert result["budget"]["density_ratio"] == plan.objective.density_budget_ratio == density
    assert plan.objective.budget.option == option
    assert [at.length_tokens for at in plan.lengths] == lengths
    assert all(at.density_ratio <= density for at in plan.lengths)
    code, shown, _ = run("plan", "show", tmp_path / "out")
    assert said in shown


def test_a_decode_budget_is_kept_by_the_plan_s_bytes(run, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["--decode-ms", "0.009@1024x64", "--device", "a10"]
    code, out, message = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, *arguments)
    assert code == 0, message
    plan = load_plan(tmp_path / "out")
    budget = plan.objective.budget
    cache_ms = 1e3 * 64 * plan.kv_bytes(1024) / (0.8 * 0.6e12)
    assert 0.008 < budget.free_amount + cache_ms <= 0.009
    assert f"Budget: {budget.option}" in out
    assert "roofline of a10: 0.8 of 0.6 TB/s" in out


def test_rules_of_a_file_are_the_only_ones(run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text("[[32, 0], [0, 0.75]]")
    code, _, message = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--rules", tmp_path / "rules.json")
    assert code == 0, message
    assert {rule for layer in load_plan(tmp_path / "out").rules for rule in layer} <= {(32, 0.0), (0, 0.75)}
    (tmp_path / "long.json").write_text("[[0, 0.75]]")
    code, _, message = run("compress", tiny_folder, "-o", tmp_path / "o", *SMALL, "--rules", tmp_path / "long.json")
    assert code == 1
    assert "At 128 tokens, the tightest length, the shortest rule keeps 96 tokens" in message


def test_a_narrower_search_binds_the_plan_and_is_told(run, tiny_folder: Path, tmp_path: Path) -> None:
    code, _, error = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--no-elastic", "--per-layer")
    assert code == 0, error
    plan = load_plan(tmp_path / "out")
    assert all(len(set(layer)) == 1 and layer[0][1] == 0 for layer in plan.rules)
    assert (plan.objective.elastic, plan.objective.per_layer) == (False, True)
    assert "fixed windows only, one rule per layer" in (tmp_path / "out/README.md").read_text()
    # a wider search does not take up the narrower one's plans
    code, _, error = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--resume")
    assert code == 0, error
    assert any(beta != 0 for layer in load_plan(tmp_path / "out").rules for _, beta in layer)


def test_a_front_is_written_and_its_plans_apply(run, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--front")
    code, _, message = run(*arguments)
    assert code == 0, message
    front = sorted(path.name for path in (tmp_path / "out/front").iterdir())
    assert front[:3] == ["front.csv", "front.png", "plan-000.json"]
    first = load_plan(tmp_path / "out/front/plan-000.json")
    assert first.model.fingerprint == load_plan(tmp_path / "out").model.fingerprint
    assert run("plan", "baseline", "duo", tiny_folder, "-o", tmp_path / "duo.json", "--length", "512",
               "--profile", tmp_path / "out/profile.safetensors")[0] == 0  # fmt: skip
    assert load_plan(tmp_path / "duo.json").model == first.model
    code, _, message = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--overwrite")
    assert code == 0, message
    assert not list((tmp_path / "out/front").iterdir())


def test_a_budget_beyond_the_model_s_context_is_refused(run, tiny_folder: Path, tmp_path: Path) -> None:
    code, _, message = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--kv-gib", "0.0005@4096")
    assert code == 2
    assert "--kv-gib 0.0005@4096x1 exceeds the model's context of 2048 tokens" in message


def test_a_budget_on_the_command_line_replaces_the_file_s(run, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("density: 0.9\nlengths: [128, 256]\nnum-samples: 2\n")
    arguments = ["--config", file, "--kv-bytes-per-token", "64"]
    code, _, message = run("compress", tiny_folder, "-o", tmp_path / "out", *arguments)
    assert code == 0, message
    assert load_plan(tmp_path / "out").objective.density_budget_ratio == 0.25


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("densty: 0.5", 3, "unknown option 'densty'; did you mean 'density'?"),
        ("density: high", 3, "density must be of type float, got 'high'"),
        ("density: 0.5\nkv-gib: 1@512", 2, "give one budget, got --density and --kv-gib"),
        ("kv_gib: 4", 3, "kv_gib must be of type str, got 4"),
        ("rules: none.json", 3, "no such file; --rules takes"),
        ("seed: true", 3, "seed must be of type int, got True"),
        ("seed: 1.5", 3, "seed must be of type int"),
        ("mixed_lengths: 1", 3, "mixed_lengths must be of type bool, got 1"),
        ("sink_tokens: abc", 3, "sink_tokens must be of type int"),
        ("validate-length: abc", 3, "validate_length must be of type int"),
        ("lengths: {a: 1}", 3, "lengths must be of type list"),
        ("- 1", 3, "wanted 'option: value' lines, got list"),
        ("a: [", 3, "cannot be read as YAML"),
        ("[" * 3000, 3, "cannot be read as YAML"),
        ("seed: 2001-13-45", 3, "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['false']", 3, "cannot be read as YAML"),
        ("\x00", 3, "cannot be read as YAML"),
        ("density: .nan", 2, "--density must lie in"),
        ("estimator: bogus", 2, "--estimator must be one of"),
        ("max_rules_per_layer: 0", 2, "--max-rules-per-layer must be at least 1"),
    ],
)
def test_a_config_file_that_cannot_be_used(run, tiny_folder: Path, tmp_path: Path, text, code, message) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    got, out, said = run("compress", tiny_folder, "-o", tmp_path / "out", "--config", file)
    assert (got, out) == (code, ""), said
    assert message in said
    assert (str(file) in said) == (code == 3 and "none.json" not in text)
    assert not (tmp_path / "out").exists()


def test_a_config_file_fills_in_and_the_command_line_wins(run, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "lengths: [128, 256]\nnum-samples: 3\nmixed-lengths: true\nseed: 7\ndensity: 1\nsink_tokens: null\n"
    )
    code, _, message = run(
        "compress", tiny_folder, "-o", tmp_path / "out", "--config", file, "--num-samples", "2", "--seed", "0"
    )
    assert code == 0, message
    plan = load_plan(tmp_path / "out")
    assert plan.calibration.lengths_tokens == (128, 256)
    assert plan.calibration.samples_per_length == 2
    assert plan.calibration.seed == 0  # typed, though equal to the default
    assert plan.objective.density_budget_ratio == 1
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["lengths"] == "128,256"
    assert run("compress", tiny_folder, "--config", tmp_path / "none.yaml")[0] == 3


def test_places_that_cannot_be_written(refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file; name a folder" in refused(2, out=tmp_path / "file")
    assert "name another place" in refused(2, out=tmp_path / "file/below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("mine")
    assert "is not empty" in refused(2, out=tmp_path / "full")
    assert "did not make (thesis.tex" in refused(2, "--overwrite", out=tmp_path / "full")
    assert (tmp_path / "full/thesis.tex").read_text() == "mine"
    (tmp_path / "log/moa.log").mkdir(parents=True)
    (tmp_path / "log/stages").mkdir()
    assert "cannot be written as the log file" in refused(2, "--resume", out=tmp_path / "log")


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_model_folder_is_no_output_folder(refused, copy: Path, flag) -> None:
    before = (copy / "config.json").read_bytes()
    assert "did not make" in refused(2, flag, model=copy, out=copy)
    assert (copy / "config.json").read_bytes() == before


def test_a_typing_error_does_not_block_the_folder(refused, run, tiny_folder: Path, tmp_path: Path) -> None:
    refused(3, model=tmp_path / "none")
    refused(3, "--dataset", tmp_path / "none")
    assert run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL)[0] == 0
    assert run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL)[0] == 2
    assert run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--overwrite")[0] == 0


def test_a_full_disk_stops_with_4_and_leaves_nothing_half_written(refused, run, tiny_folder, tmp_path, monkeypatch):
    real, left = os.fsync, [6]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "are to be written; free some room and run the command again" in refused(4)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--resume")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_a_log_that_cannot_grow_stops_with_4(refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/moa.log").symlink_to("/dev/full")
    assert "the disk is full" in refused(4)


def test_a_damaged_stage_is_named(run, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("compress", tiny_folder, "-o", out, *SMALL)[0] == 0
    whole = (out / "plan.json").read_bytes()
    for pattern in ("answers-128-*", "profile-256-*", "optimize-*", "validate-*"):
        file = next((out / "stages").glob(pattern))
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        code, _, message = run("compress", tiny_folder, "-o", out, *SMALL, "--resume")
        if file.name.startswith("validate"):  # half a number is a number
            file.write_bytes(b"NaN")
            code, _, message = run("compress", tiny_folder, "-o", out, *SMALL, "--resume")
        assert code == 3
        assert file.name in message
        file.unlink()
    assert run("compress", tiny_folder, "-o", out, *SMALL, "--resume")[0] == 0
    assert (out / "plan.json").read_bytes() == whole


def test_a_dry_run_leaves_nothing(run, tiny_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--dry-run")
    assert code == 0
    assert "In all about" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = run("compress", tiny_folder, "-o", tmp_path / "out", *SMALL, "--dry-run", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"text", "steps", "whole_s", "peak_bytes", "estimate"}
    assert found["estimate"]["architecture"] == "LlamaForCausalLM"
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_a_text_as_the_model_will_see_it(run, copy: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %} {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    (copy / "chat_template.jinja").write_text(template)
    code, out, _ = run("compress", copy, "-o", tmp_path / "out", *SMALL, "--dry-run")
    assert code == 0
    shown = out.split("A text of 256 tokens, as the model will see it:\n")[1].splitlines()[0]
    assert "[... 176 tokens ...]" in shown
    assert " is <unk> : " in shown  # the demo's tokenizer knows no word for roles
    code, out, _ = run("compress", copy, "-o", tmp_path / "out", *SMALL, "--dry-run", "--chat-template", "off")
    assert "<unk>" not in out


def test_estimate(run, tiny_folder: Path) -> None:
    code, out, _ = run("estimate", tiny_folder, *SMALL, "--density", "0.25", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {
        "architecture", "parameters", "dtype", "weight_bytes", "density", "lengths", "time_s", "peak_bytes",
        "available_bytes", "gradient_checkpointing", "memory_by", "warning",
    }  # fmt: skip
    assert [at["length_tokens"] for at in found["lengths"]] == [128, 256, 512]
    for at in found["lengths"]:
        assert set(at) == {"length_tokens", "time_s", "peak_bytes", "dense_kv_bytes", "plan_kv_bytes"}
        assert at["dense_kv_bytes"] == at["length_tokens"] * 2 * 2 * 2 * 8 * 4
        assert at["plan_kv_bytes"] * 4 == at["dense_kv_bytes"]
    assert found["weight_bytes"] == found["parameters"] * 4
    assert found["time_s"] > 0
    code, out, _ = run("estimate", tiny_folder, *SMALL)
    assert code == 0
    assert "512" in out
    assert run("estimate", tiny_folder, "--lengths", "4096")[0] == 2  # beyond the model's context
