"""Plans from files, with published and own forms, and the names that tables give patterns."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moa.errors import PlanError, UsageError
from moa.eval.gpu import patterns
from moa.eval.gpu.heads import LLAMA_8B, QWEN_7B
from moa.plan import ModelShape, Plan


def moa_file(tmp_path, layers: int = 8, heads: int = 32):
    alphas = [[1024.0 * (h % 4 == 0) for h in range(heads)] for _ in range(layers)]
    betas = [[0.125 * (1 + layer % 4) for _ in range(heads)] for layer in range(layers)]
    path = tmp_path / "moa_alpha_beta.json"
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return path


def test_moa_s_form_is_united_over_groups_and_takes_some_layers(tmp_path) -> None:
    heads, pattern = patterns.from_file("Llama-3-8B", moa_file(tmp_path))
    assert heads == LLAMA_8B
    assert (pattern.layers, pattern.rules.alpha.shape[1], pattern.published) == (patterns.PLAN_LAYERS, 8, True)
    assert pattern.rules.length_mode == "pinned"
    assert (pattern.rules.span(65536) >= 0.125 * 65536 + 1024).all()


def test_moa_s_form_needs_a_known_shape_of_its_size(tmp_path) -> None:
    with pytest.raises(UsageError, match="does not say its KV heads; call it Llama-3-8B"):
        patterns.from_file("Llama-3-8b", moa_file(tmp_path))
    with pytest.raises(PlanError, match="28 query heads"):
        patterns.from_file("Qwen2.5-7B", moa_file(tmp_path))


def test_our_plans_bring_their_shape(tmp_path) -> None:
    path = tmp_path / "plan.json"
    shape = ModelShape(architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=64)
    Plan.uniform(shape, 100, 0.25).save(path)
    heads, pattern = patterns.from_file("mine", path)
    assert (heads.name, heads.heads, heads.kv_heads, heads.head_dim) == ("mine", 4, 2, 64)
    assert (pattern.layers, pattern.published) == (2, False)
    with pytest.raises(PlanError):
        patterns.from_file("mine", tmp_path / "nothing.json")


def test_the_published_file_itself(reference_data) -> None:
    path = reference_data / "plans" / "gradientai--Llama-3-8B-Instruct-262k.json"
    _, pattern = patterns.from_file("Llama-3-8B", path)
    assert 0.4 < pattern.rules.density_ratio(65536) < 0.9
    content = json.loads(path.read_text())
    pairs = {pair for a, b in zip(content["alphas"], content["betas"], strict=True) for pair in zip(a, b, strict=True)}
    assert {rule for layer in patterns.PUBLISHED_LAYERS for rule in layer[:2]} <= pairs


def test_names_say_what_is_kept() -> None:
    assert patterns.uniform(0.125, QWEN_7B).name == "uniform 12.5 %"
    assert patterns.uniform(1.0, QWEN_7B).is_dense
    window = patterns.window(1024, QWEN_7B)
    assert window.name == "window 1,024"
    assert not window.is_dense
    assert np.unique(window.rules.span(1 << 16)).tolist() == [1088]
    assert window.mean_span(1 << 16) == 1088
