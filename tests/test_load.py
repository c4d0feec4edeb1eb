"""Loading says what is wrong with a model folder, and never fills in what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, PreTrainedConfig

from moa.errors import ModelError, UsageError
from moa.hf.load import load_model, load_tokenizer

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip


def test_a_model_comes_in_eval_mode_in_its_own_dtype(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_folder))
    assert not model.training
    assert model.dtype == torch.float32
    assert load_model(str(tiny_folder), "bfloat16").dtype == torch.bfloat16
    model.to(torch.float16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float16


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, attn_logit_softcapping=1.0, query_pre_attn_scalar=4),
        GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    ],
    ids=lambda config: config.model_type,
)
def test_capped_scores_and_learned_sinks_are_kept(config: PreTrainedConfig, tmp_path: Path) -> None:
    """Stock kernels know neither."""
    torch.manual_seed(0)
    model, tokens = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(),
        torch.arange(3, 40)[None],
    )
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path))(tokens).logits, model(tokens).logits)


def test_tied_weights_are_not_missing(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tied"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = load_model(str(folder))
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_missing_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "part"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "layers.1" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"9 weights are missing \(model\.layers\.1\..*, \.\.\.\)"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", ["float99", "int8", "", "Float32", "torch.float32"])
def test_dtypes_that_are_none(tiny_folder: Path, dtype) -> None:
    with pytest.raises(UsageError, match="--dtype must be auto or one of float64, float32"):
        load_model(str(tiny_folder), dtype)


def test_code_that_comes_with_a_model_is_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "code"))
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": mapped}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "", "[]", '{"version": "1.0"}', "\x00"])
def test_tokenizers_that_are_damaged(tiny_folder: Path, tmp_path: Path, text) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "damaged"))
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["/no/such", "./no", "~/no", "a/b/c", "no", "x" * 5000, "org/none", ""])
def test_names_that_lead_nowhere(name) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert len(str(caught.value)) < 600
    with pytest.raises(ModelError):
        load_tokenizer(name)
