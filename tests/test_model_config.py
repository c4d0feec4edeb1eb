"""A model's shape from its config.json."""

from __future__ import annotations

import json

import pytest

from moa.errors import ModelError, PlanError
from moa.model_config import check_model, read_model_config
from moa.plan import Plan

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def read(folder, **changes):
    content = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(content))
    return read_model_config(folder)


def test_reads_a_folder_and_a_file(tmp_path):
    config = read(tmp_path)
    assert config == read_model_config(tmp_path / "config.json")
    shape = config.shape
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (2, 8, 2, 64)
    assert (shape.architecture, shape.dtype, config.max_length_tokens) == ("LlamaForCausalLM", "bfloat16", 8192)


def test_defaults_are_those_of_transformers(tmp_path):
    config = read(tmp_path, num_key_value_heads="absent", torch_dtype="absent", max_position_embeddings="absent")
    assert (config.shape.kv_heads, config.shape.dtype, config.max_length_tokens) == (8, "float32", None)
    assert read(tmp_path, head_dim=80).shape.head_dim == 80
    assert read(tmp_path, head_dim=None, dtype="float16").shape.dtype == "float16"
    assert read(tmp_path, architectures="absent", model_type="llama").shape.architecture == "llama"


def test_reads_the_language_part_of_a_model_of_more(tmp_path):
    text = {**LLAMA, "num_hidden_layers": 3}
    config = read(tmp_path, text_config=text, num_hidden_layers="absent")
    assert config.shape.layers == 3


def test_agrees_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        hidden_size=96,
        architectures=["X"],
        dtype="float16",
    )
    theirs.save_pretrained(tmp_path)
    shape = read_model_config(tmp_path).shape
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.dtype) == (3, 6, 2, 16, "float16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "absent"}, "the key 'num_hidden_layers' is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number above 0, got 0"),
        ({"num_key_value_heads": 3}, r"heads \(8\) must be a multiple of kv_heads \(3\)"),
        ({"hidden_size": "absent"}, "'hidden_size' is missing"),
        ({"hidden_size": 4}, "head_dim"),
    ],
)
def test_what_does_not_say_a_shape_is_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(("text", "message"), [("[]", "JSON object, got list"), ("{", "not JSON"), ("", "not JSON")])
def test_what_is_no_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_model_config(tmp_path)


def test_no_config_is_said(tmp_path):
    with pytest.raises(ModelError, match="no such file; name a model folder"):
        read_model_config(tmp_path)


def test_a_plan_fits_its_own_model_only(tmp_path):
    config = read(tmp_path)
    plan = Plan.uniform(config.shape, 256, 0.0)
    check_model(plan, config, "plan.json")
    with pytest.raises(PlanError, match="plan is for a model with layers 2, this model has 3"):
        check_model(plan, read(tmp_path, num_hidden_layers=3), "plan.json")
