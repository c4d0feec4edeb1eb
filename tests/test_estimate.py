"""Estimates come from a config alone, for any decoder, and warn where memory would run out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moa import estimate as module
from moa.errors import ModelError, UsageError
from moa.estimate import estimate_compress
from moa.hf.load import load_model
from moa.hf.shape import model_shape
from moa.plan import Plan
from moa.settings import CompressSettings

SETTINGS = CompressSettings(lengths_tokens=(128, 256), num_samples=2)


def folder_of(tmp_path: Path, **config: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_it_agrees_with_the_model_itself(tiny_folder: Path) -> None:
    found, model = estimate_compress(str(tiny_folder), SETTINGS), load_model(str(tiny_folder))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.architecture == type(model).__name__
    dense = Plan.uniform(model_shape(model), 0, 1.0)
    assert [at.dense_kv_bytes for at in found.lengths] == [dense.kv_bytes(n) for n in (128, 256, 512)]
    assert all(at.peak_bytes >= found.weight_bytes for at in found.lengths)
    assert found.peak_bytes == max(at.peak_bytes for at in found.lengths)
    assert found.time_s == pytest.approx(sum(at.time_s for at in found.lengths))


def test_every_round_is_a_profile_more(monkeypatch, tiny_folder: Path) -> None:
    monkeypatch.setattr(module, "_measure", lambda *_: module._Rates(1e9, 1e-9))
    once, twice = (estimate_compress(str(tiny_folder), replace(SETTINGS, rounds=rounds)) for rounds in (1, 2))
    assert [at.time_s for at in twice.lengths] == pytest.approx(
        [at.time_s * k for at, k in zip(once.lengths, (2, 2, 1), strict=True)]
    )


def test_memory_is_simulated_with_or_without_checkpointing(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    plain, less = (
        estimate_compress(str(tiny_folder), replace(SETTINGS, gradient_checkpointing=on)) for on in (False, True)
    )
    assert (plain.memory_by, plain.gradient_checkpointing, less.gradient_checkpointing) == ("simulation", False, True)
    assert less.lengths[1].peak_bytes < plain.lengths[1].peak_bytes
    assert plain.lengths[1].peak_bytes > 1.5 * plain.lengths[0].peak_bytes - plain.weight_bytes
    monkeypatch.setattr(module.footprint, "available_bytes", lambda: plain.lengths[1].peak_bytes)
    assert estimate_compress(str(tiny_folder), SETTINGS).gradient_checkpointing


def test_experts_without_a_meta_form_are_estimated_by_a_rule_of_thumb(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    folder = folder_of(
        tmp_path, model_type="mixtral", num_local_experts=4, num_key_value_heads=2, dtype="float32", **sizes
    )
    found = estimate_compress(folder, SETTINGS)
    assert found.memory_by == "rule of thumb"
    assert found.peak_bytes > found.weight_bytes


def test_configs_with_other_names_for_their_sizes(tmp_path: Path) -> None:
    found = estimate_compress(
        folder_of(tmp_path, model_type="gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=600), SETTINGS
    )
    assert found.architecture == "GPT2LMHeadModel"
    assert found.lengths[0].dense_kv_bytes == 128 * 2 * 2 * 32 * 4


def test_a_model_larger_than_memory_gets_a_warning(tmp_path: Path, monkeypatch, tiny_folder: Path) -> None:
    monkeypatch.setattr(module.footprint, "available_bytes", lambda: 1000)
    assert "use shorter --lengths or a larger machine" in estimate_compress(str(tiny_folder), SETTINGS).warning
    monkeypatch.undo()
    huge = {"hidden_size": 1 << 22, "intermediate_size": 1 << 22, "num_attention_heads": 4, "vocab_size": 99}
    found = estimate_compress(folder_of(tmp_path, model_type="llama", num_hidden_layers=1, **huge), SETTINGS)
    assert found.weight_bytes > 1 << 45
    assert found.warning
    assert found.as_dict()["warning"] == found.warning


@pytest.mark.parametrize(
    "config", [{"model_type": "t5"}, {"model_type": "clip"}, {}, {"model_type": "llama", "num_attention_heads": 0}]
)
def test_what_is_no_decoder_is_refused(tmp_path: Path, config) -> None:
    with pytest.raises(ModelError, match="its config"):
        estimate_compress(folder_of(tmp_path, **config), SETTINGS)


def test_lengths_beyond_the_context_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="context of 2048"):
        estimate_compress(str(tiny_folder), CompressSettings(lengths_tokens=(2048,)))
