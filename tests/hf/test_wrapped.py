"""Quantised models and PEFT-wrapped ones: fingerprint, profile, compress and run under a plan."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moa.errors import ModelError, PlanError
from moa.hf import apply, fingerprint, model_shape
from moa.hf.load import load_model
from moa.pipeline import compress
from moa.plan import Plan, load_plan
from moa.profile.collect import InfluenceSettings, profile_length
from moa.profile.data import TextSample
from moa.settings import CompressSettings
from moa.stages import Workspace

with warnings.catch_warnings():  # torchao registers its enums in a way that torch has deprecated
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

# peft asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = CompressSettings(lengths_tokens=(64, 128), num_samples=2, max_candidates=2, supervision="reference")


@pytest.fixture
def big_model(make: SimpleNamespace) -> PreTrainedModel:
    """One that knows the demo tokenizer's tokens."""
    return make.model(vocab_size=400)


@pytest.fixture
def quantised(big_model: PreTrainedModel) -> PreTrainedModel:
    quantize_(big_model, Int8WeightOnlyConfig())
    assert "Int8Tensor" in str(type(big_model.model.layers[0].self_attn.q_proj.weight))
    return big_model


@pytest.fixture
def adapted(big_model: PreTrainedModel) -> torch.nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(big_model, config).eval()


def tokens(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 400, (rows, 90), generator=torch.Generator().manual_seed(1))


def sample() -> TextSample:
    ids = tokens()[0].tolist()
    return TextSample(tuple(ids), tuple(range(86, 90)), tuple(ids[86:]))


def compressed(model: object, folder: Path) -> Plan:
    from moa.demo.tokenizer import build_tokenizer

    return compress(model, build_tokenizer(), SETTINGS, Workspace.open(folder, resume=False, overwrite=False)).plan


def test_a_quantised_model_is_profiled_compressed_and_run(quantised, make, tmp_path: Path) -> None:
    plan = compressed(quantised, tmp_path)
    assert plan.model.dtype == "float32"
    outs = []
    for backend in ("reference", "torch"):
        with apply(quantised, plan, backend=backend):
            outs.append(quantised.generate(tokens(2), **make.greedy))
    assert torch.equal(*outs)
    want = quantised.generate(tokens(2), **make.greedy)
    with apply(quantised, Plan.uniform(model_shape(quantised), 0, 1.0)):
        assert torch.equal(quantised.generate(tokens(2), **make.greedy), want)


def test_the_fingerprint_sees_a_quantised_weight(quantised, make) -> None:
    before = fingerprint(quantised)
    assert before != fingerprint(make.model(vocab_size=400))
    again = make.model(vocab_size=400)
    quantize_(again, Int8WeightOnlyConfig())
    assert fingerprint(again) == before
    weight = again.model.layers[1].self_attn.k_proj.weight
    weight.qdata[0, 0] += 1
    assert fingerprint(again) != before


def test_the_fingerprint_sees_saved_buffers_where_quantisers_keep_their_weights(model) -> None:
    before = fingerprint(model)
    model.model.layers[0].register_buffer("scratch", torch.zeros(3), persistent=False)
    assert fingerprint(model) == before
    model.model.layers[0].register_buffer("qweight", torch.zeros(3))
    zeros = fingerprint(model)
    assert zeros != before
    model.model.layers[0].qweight += 1
    assert fingerprint(model) != zeros


def test_a_peft_model_and_its_base_are_one_model_to_a_plan(adapted, make, tmp_path: Path) -> None:
    base = adapted.get_base_model()
    assert model_shape(adapted) == model_shape(base)
    assert model_shape(adapted).architecture == "LlamaForCausalLM"
    settings = InfluenceSettings()
    losses = [profile_length(m, [sample()], 90, 4, 16, settings).losses for m in (adapted, base)]
    np.testing.assert_array_equal(*losses)
    assert losses[0].max() > 0
    plan = compressed(adapted, tmp_path)
    outs = []
    for attached, backend in ((adapted, "torch"), (base, "torch"), (adapted, "reference")):
        with apply(attached, plan, backend=backend) as attachment:
            assert adapted.moa is base.moa is attachment
            outs += [model.generate(input_ids=tokens(2), **make.greedy) for model in (adapted, base)]
            assert attachment.kv_bytes > 0
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert "moa" not in vars(base)
    assert not hasattr(adapted, "moa")


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")
def test_a_loaded_adapter_runs_and_goes_dense_and_back(adapted, make, tmp_path: Path) -> None:
    """Saved and loaded as its users do; with the adapter off, the base's weights run under the same plan."""
    base = make.model(vocab_size=400)
    base.save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    plan = make.plan(loaded)
    dense = loaded.eval().generate(input_ids=tokens(2), **make.greedy)
    with apply(base, plan, backend="reference", allow_other_weights=True):
        without = base.generate(tokens(2), **make.greedy)
    outs = []
    for backend in ("torch", "reference"):
        with apply(loaded, plan, backend=backend):
            outs.append(loaded.generate(input_ids=tokens(2), **make.greedy))
            with loaded.disable_adapter():
                assert torch.equal(loaded.generate(input_ids=tokens(2), **make.greedy), without)
            with loaded.moa.disabled():
                assert torch.equal(loaded.generate(input_ids=tokens(2), **make.greedy), dense)
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], dense)
    assert not torch.equal(outs[0], without)


def test_a_saved_adapter_takes_the_plan_along(adapted, make, tmp_path: Path) -> None:
    plan, before = make.plan(adapted), sorted(vars(adapted))
    with apply(adapted, plan):
        adapted.save_pretrained(tmp_path)
    assert load_plan(tmp_path) == plan
    assert (tmp_path / "adapter_config.json").exists()
    assert sorted(vars(adapted)) == before


def test_an_adapter_makes_other_weights(big_model, make) -> None:
    plan = make.plan(big_model)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(big_model, config).eval()
    with pytest.raises(PlanError, match="fingerprint"):
        apply(adapted, plan)
    apply(adapted, plan, allow_other_weights=True).detach()


def test_a_tuned_prefix_is_refused_as_keys_of_no_token(big_model, make) -> None:
    plan = make.plan(big_model)
    adapted = get_peft_model(big_model, PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    with apply(adapted, plan, allow_other_weights=True), pytest.raises(ModelError, match="keep every token"):
        adapted(input_ids=tokens())


def test_a_quantised_checkpoint_loads_and_keeps_its_fingerprint(make, tmp_path: Path) -> None:
    from transformers import TorchAoConfig

    make.model(vocab_size=400).save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config).eval()
    quantised.save_pretrained(tmp_path / "int8")
    loaded = load_model(str(tmp_path / "int8"))
    assert fingerprint(loaded) == fingerprint(quantised)
    apply(loaded, make.plan(quantised)).detach()
