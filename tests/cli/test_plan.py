"""`moa plan`: results on stdout, the rest on stderr, exit codes."""

from __future__ import annotations

import json

import pytest

from moa.cli.app import run
from moa.plan import ModelShape, Plan, load_plan

SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=16, dtype="bfloat16")
RULES = (((0, 1.0), (256, 0.0)), ((-64, 0.5), (0, 0.125)))
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


@pytest.fixture
def plan_file(tmp_path):
    plan = Plan(model=SHAPE, rules=RULES)
    validation = {"length_tokens": 8192, "samples": 4, "dense_loss": 1.0, "sparse_loss": 1.125, "candidates": 3}
    records = {
        "lengths": (plan.at_length(1024), plan.at_length(4096)),
        "solver": {"name": "highs", "status": "optimal", "milp_status": "optimal", "bound": 0.1, "gap_ratio": 0.0},
        "validation": validation,
    }
    Plan.model_validate({"model": SHAPE, "rules": RULES, **records}).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def call(capsys, *arguments, code=0):
    assert run([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def test_show_says_what_is_kept_and_what_it_costs(capsys, plan_file):
    out = call(capsys, "plan", "show", plan_file).out
    for said in ("LlamaForCausalLM", "4 distinct, 2 per layer", "1 of 4", "highs, optimal", "1.1250, dense 1.0000"):
        assert said in out
    rows = [line.split() for line in out.splitlines()]
    kept = 4096 + 256 + 1984 + 512
    assert ["4096", f"{kept / 16384:.4f}", "107", "B", f"{kept * 64 / 1024:.2f}", "KiB", "1.00", "MiB"] in rows
    assert "    1  1 x -64+0.5*n, 1 x 0.125*n" in out.splitlines()


def test_show_json_of_one_length_has_the_costs_at_the_top(capsys, plan_file):
    content = json.loads(call(capsys, "plan", "show", plan_file, "--json", "--length", 4096).out)
    plan = load_plan(plan_file)
    assert content["density"] == plan.span_rules.density_ratio(4096)
    assert content["kv_bytes"] == plan.kv_bytes(4096)
    assert content["kv_bytes_per_token"] == plan.kv_bytes(4096) / 4096
    assert content["distinct_rules"] == 4
    assert content["rules_per_layer"] == [2, 2]


def test_show_json_of_several_lengths_has_a_list(capsys, plan_file):
    content = json.loads(call(capsys, "plan", "show", plan_file, "--json", "--length", 64, "--length", 70_000).out)
    assert "density" not in content
    assert [cost["length_tokens"] for cost in content["lengths"]] == [64, 70_000]
    assert content["lengths"][0]["density"] == 1
    default = json.loads(call(capsys, "plan", "show", plan_file, "--json").out)
    assert [cost["length_tokens"] for cost in default["lengths"]] == [1024, 4096]


def test_validate(capsys, plan_file, model_folder):
    assert ": ok" in call(capsys, "plan", "validate", plan_file).out
    assert ": ok" in call(capsys, "plan", "validate", plan_file, "--model", model_folder).out
    (model_folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 3}))
    said = call(capsys, "plan", "validate", plan_file, "--model", model_folder, code=3)
    assert "layers 2, this model has 3" in said.err
    plan_file.write_text(plan_file.read_text().replace("0.125", "0.25"))
    said = call(capsys, "plan", "validate", plan_file, code=3)
    assert "sha256" in said.err
    assert said.out == ""


def test_convert_moa(capsys, tmp_path, model_folder):
    source, output = tmp_path / "moa.json", tmp_path / "new" / "plan.json"
    source.write_text(json.dumps({"alphas": [[0, 1024, -1024, 0]] * 2, "betas": [[0.5, 0, 1, 0.5]] * 2}))
    arguments = ("plan", "convert", source, "--model-config", model_folder / "config.json", "-o", output)
    said = call(capsys, *arguments)
    assert said.out == f"{output}\n"
    assert "density" in said.err
    assert load_plan(output).length_mode == "pinned"
    assert ": ok" in call(capsys, "plan", "validate", output, "--model", model_folder).out
    said = call(capsys, *arguments, code=2)
    assert "--overwrite" in said.err
    call(capsys, *arguments, "--overwrite", "--max-length", 4096, "--length", 1000)
    assert [cost.length_tokens for cost in load_plan(output).lengths] == [1000]


def test_convert_duo(capsys, tmp_path, model_folder):
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.0\n0.2\t0.7\n")
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 256}')
    source, output = tmp_path / "full_attention_heads.tsv", tmp_path / "plan.json"
    call(capsys, "plan", "convert", source, "--model-config", model_folder, "-o", output, "--threshold", 0.6)
    assert load_plan(output).rules == (((0, 1.0), (320, 0.0)), ((320, 0.0), (0, 1.0)))


def test_convert_refuses_the_wrong_form(capsys, tmp_path, plan_file, model_folder):
    output = tmp_path / "other.json"
    said = call(capsys, "plan", "convert", plan_file, "--model-config", model_folder, "-o", output, code=3)
    assert "alphas and betas" in said.err
    assert not output.exists()
    arguments = ("plan", "convert", plan_file, "--model-config", model_folder, "-o", output, "--format", "gguf")
    call(capsys, *arguments, code=2)


def test_diff(capsys, tmp_path, plan_file):
    other = tmp_path / "other.json"
    Plan(model=SHAPE, rules=(RULES[0], ((-64, 0.5), (0, 1.0)))).save(other)
    content = json.loads(call(capsys, "plan", "diff", plan_file, other, "--length", 4096, "--json").out)
    assert content["heads"] == [{"layer": 1, "kv_head": 1, "first": [0, 0.125], "second": [0, 1.0]}]
    assert content["lengths"][0]["difference"] == pytest.approx((4096 - 512) / 16384)
    assert not content["same"]
    out = call(capsys, "plan", "diff", plan_file, other).out
    assert "1 of 4 KV heads differ" in out
    assert "dense" in out
    assert "0 of 4" in call(capsys, "plan", "diff", plan_file, plan_file).out


def test_diff_of_different_models(capsys, tmp_path, plan_file):
    shape = SHAPE.model_copy(update={"layers": 1})
    Plan(model=shape, rules=RULES[:1]).save(tmp_path / "other.json")
    said = call(capsys, "plan", "diff", plan_file, tmp_path / "other.json", code=3)
    assert "cannot be compared" in said.err


def test_schema_is_a_schema_of_the_plan(capsys, plan_file):
    import jsonschema

    jsonschema.validate(json.loads(plan_file.read_text()), json.loads(call(capsys, "plan", "schema").out))


def test_baseline_writes_a_plan_at_equal_bytes(capsys, tmp_path):
    for name, density in (("uniform", 0.25), ("pyramid", 0.25), ("dense", 1.0)):
        file = tmp_path / f"{name}.json"
        where = ("-o", file, "--density", 0.25, "--length", 4096)
        assert call(capsys, "plan", "baseline", name, "demo", *where).out.strip() == str(file)
        assert load_plan(file).at_length(4096).density_ratio == pytest.approx(density, abs=1e-2)
    assert "baseline" in call(capsys, "plan", "show", tmp_path / "uniform.json").out
    assert "profile.safetensors" in call(capsys, "plan", "baseline", "duo", "demo", "-o", tmp_path / "d", code=2).err
    assert "--overwrite" in call(capsys, "plan", "baseline", "dense", "demo", "-o", tmp_path / "dense.json", code=2).err
