"""Model shapes and fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moa.errors import ModelError
from moa.hf import check_plan, fingerprint, model_shape
from moa.plan import Plan


def test_the_shape_is_the_configs(model) -> None:
    shape = model_shape(model, "tiny", "main")
    assert (shape.architecture, shape.layers, shape.heads, shape.kv_heads) == ("LlamaForCausalLM", 2, 8, 4)
    assert (shape.head_dim, shape.dtype, shape.name, shape.revision) == (16, "float32", "tiny", "main")


def test_an_explicit_head_dim_wins(make) -> None:
    assert model_shape(make.model(head_dim=80)).head_dim == 80


def test_the_fingerprint_survives_saving_and_loading(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(model)


def test_the_fingerprint_sees_weights_and_dtype(model, make) -> None:
    before = fingerprint(model)
    assert fingerprint(make.model(seed=1)) != before
    assert fingerprint(make.model().to(torch.bfloat16)) != before
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 1e-3
    assert fingerprint(model) != before


def test_weights_that_are_not_there_are_an_error(make) -> None:
    with pytest.raises(ModelError, match="meta device"):
        fingerprint(make.model().to("meta"))


def test_an_imported_plan_without_fingerprint_fits_any_weights(model, make) -> None:
    shape = model_shape(model).model_copy(update={"fingerprint": ""})
    check_plan(make.model(seed=1), Plan.uniform(shape, 0, 0.5))
