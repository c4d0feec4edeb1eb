"""Models that accelerate has offloaded or spread: the same model, the same plan, the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, PreTrainedModel

from moa.devices import compute_devices, input_device
from moa.errors import ModelError
from moa.eval.conditions import environment
from moa.hf import apply, fingerprint
from moa.hf.load import load_model, load_tokenizer
from moa.pipeline import compress
from moa.profile import footprint
from moa.profile.supervise import supervise
from moa.profile.synthetic import synthetic_samples
from moa.settings import CompressSettings
from moa.stages import Workspace

SETTINGS = CompressSettings(lengths_tokens=(128,), validate_length_tokens=256, num_samples=2, max_candidates=2)
ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
REST = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}


def on_disk(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, device_map={**ON_DISK, **REST}).eval()


def offloaded(folder: Path) -> PreTrainedModel:
    """Its first parameter is a placeholder, so that `model.device` is the meta device."""
    return cpu_offload(load_model(str(folder)), execution_device=torch.device("cpu"))


def buffers_too(folder: Path) -> PreTrainedModel:
    return cpu_offload(load_model(str(folder)), execution_device=torch.device("cpu"), offload_buffers=True)


def block_at_a_time(folder: Path) -> PreTrainedModel:
    """A block's hook keeps the weights of the modules in it."""
    classes = ["LlamaDecoderLayer"]
    return cpu_offload(load_model(str(folder)), execution_device=torch.device("cpu"), preload_module_classes=classes)


MAKERS = [on_disk, offloaded, buffers_too, block_at_a_time]


@pytest.fixture(scope="module")
def tied_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    config = load_model(str(tiny_folder)).config
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", MAKERS)
def test_the_fingerprint_is_the_models_own(tiny_folder: Path, make: Callable[[Path], PreTrainedModel]) -> None:
    model = make(tiny_folder)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert fingerprint(model) == fingerprint(load_model(str(tiny_folder)))
    assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("make", [offloaded, block_at_a_time])
def test_a_tied_weight_counts_once(tied_folder: Path, make: Callable[[Path], PreTrainedModel]) -> None:
    assert fingerprint(make(tied_folder)) == fingerprint(load_model(str(tied_folder)))


def test_the_fingerprint_sees_an_offloaded_weight(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-3
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert fingerprint(model) != before


def test_a_placeholder_without_values_is_refused(tiny_folder: Path) -> None:
    model = on_disk(tiny_folder)
    model.model.layers[0].to("meta")
    with pytest.raises(ModelError, match=r"model\.layers\.0\..* is on the meta device"):
        fingerprint(model)


@pytest.mark.parametrize("make", [on_disk, offloaded])
def test_compress_and_generate_give_the_same(
    tiny_folder: Path, tmp_path: Path, make: Callable[[Path], PreTrainedModel]
) -> None:
    tokenizer, text = load_tokenizer(str(tiny_folder)), torch.arange(5, 205)[None]
    found, written = [], []
    for name, model in (("plain", load_model(str(tiny_folder))), ("other", make(tiny_folder))):
        with Workspace.open(tmp_path / name, resume=False, overwrite=False) as workspace:
            found.append(compress(model, tokenizer, SETTINGS, workspace, "tiny"))
        with apply(model, found[0].plan):
            written.append(model.generate(text, do_sample=False, max_new_tokens=12, eos_token_id=None).tolist())
    assert found[1].plan == found[0].plan
    assert found[1].true_losses == found[0].true_losses
    assert written[1] == written[0]


@pytest.mark.parametrize("make", [on_disk, offloaded])
def test_answers_the_model_writes_are_the_same(tiny_folder: Path, make: Callable[[Path], PreTrainedModel]) -> None:
    tokenizer = load_tokenizer(str(tiny_folder))
    texts = synthetic_samples(tokenizer, 128, 1, seed=0)
    open_end = texts[0].__class__(texts[0].token_ids, (), ())
    want, got = (
        tuple(supervise(model, (*texts, open_end), 5)) for model in (load_model(str(tiny_folder)), make(tiny_folder))
    )
    assert got == want


def test_free_memory_is_that_of_the_gpus_that_compute(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloaded(tiny_folder)
    for module, device in ((model.model.embed_tokens, 0), (model.model.norm, "cuda:1"), (model.lm_head, "cuda:1")):
        module._hf_hook.execution_device = device
    free = {torch.device("cuda", 0): 3 << 30, torch.device("cuda", 1): 5 << 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 << 30))
    assert footprint.available_bytes(model) == 8 << 30
    assert input_device(model) == torch.device("cuda", 0)
    assert compute_devices(model) == {*free, torch.device("cpu")}


def test_a_record_names_the_device_that_computes(tiny_folder: Path) -> None:
    assert environment(offloaded(tiny_folder)).device == environment(load_model(str(tiny_folder))).device


def test_a_model_without_hooks_is_where_its_weights_are(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    assert input_device(model) == model.device
    assert compute_devices(model) == {model.device}
    assert input_device(model.to("meta")) == torch.device("meta")
