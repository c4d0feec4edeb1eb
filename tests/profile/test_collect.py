"""Checkpointed, spread and offloaded models have the same profile, and are left as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel

from moa.errors import DataError, ModelError
from moa.profile import attention, torch_sweep
from moa.profile.collect import InfluenceSettings, profile_length, profiled
from moa.profile.data import TextSample
from moa.profile.sums import Sums

SINK, LEAST, N = 3, 6, 40


def losses(model: PreTrainedModel, make, checkpointing: bool = False) -> np.ndarray:
    samples = [make.sample(N, 3, seed) for seed in (1, 2)]
    return profile_length(model, samples, N, SINK, LEAST, InfluenceSettings(), checkpointing=checkpointing).losses


def forwards(model: PreTrainedModel) -> list[object]:
    return [vars(module).get("forward") for module in model.modules()]


def test_checkpointing_changes_no_profile(make, monkeypatch) -> None:
    calls = {"forward": 0, "backward": 0}

    def counted(name: str):
        run = getattr(torch_sweep, name)

        def count(*args: object) -> object:
            calls[name] += 1
            return run(*args)

        return count

    model = make.model()
    want, before = losses(model, make), forwards(model)
    for name in calls:
        monkeypatch.setattr(torch_sweep, name, counted(name))
    got = losses(model, make, checkpointing=True)
    assert calls == {"forward": 8, "backward": 4}  # two samples of two layers; recomputed, but swept once
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert want.max() > 0
    assert forwards(model) == before


def test_checkpointing_keeps_dropout_off(make) -> None:
    model = make.model(attention_dropout=0.5)
    model.train()
    want = losses(model, make)
    np.testing.assert_array_equal(losses(model, make, checkpointing=True), want)
    assert all(module.training for module in model.modules())


def test_sinks_and_experts_can_be_checkpointed(make) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = GptOssConfig(**sizes, **heads, num_local_experts=2, num_experts_per_tok=1, sliding_window=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    want = losses(model, make)
    assert want.max() > 0
    np.testing.assert_allclose(losses(model, make, checkpointing=True), want, rtol=1e-5)


def test_a_model_without_layers_to_checkpoint_says_so(make, monkeypatch) -> None:
    model = make.model()
    monkeypatch.setattr("moa.profile.collect.GradientCheckpointingLayer", nn.Conv1d)
    with pytest.raises(ModelError, match="use --no-gradient-checkpointing"), profiled(model, checkpointing=True):
        pass
    assert model.config._attn_implementation != attention.NAME


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "disk", "split"])
def test_offloaded_models_have_the_same_profile(make, tmp_path: Path, kind, checkpointing) -> None:
    model = make.model()
    want = losses(model, make)
    if kind == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk":
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
        rest = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        dispatch_model(model, {**layers, **rest}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(p.is_meta for p in model.parameters())
    hooked = forwards(model)
    np.testing.assert_allclose(losses(model, make, checkpointing), want, rtol=1e-6)
    assert forwards(model) == hooked
    remove_hook_from_submodules(model)


@pytest.mark.parametrize("lambdas", [(1.0,), (1.0, 0.05)])
def test_a_profile_goes_on_from_any_text_to_the_same_bits(make, lambdas) -> None:
    model, samples = make.model(), [make.sample(N, seed=seed) for seed in range(4)]
    settings, kept, done = InfluenceSettings(attenuations=lambdas), [], []
    want = profile_length(model, samples, N, SINK, LEAST, settings, done.append, keep=kept.append)
    assert [sums.texts for sums in kept] == [1, 2, 3]  # the last text needs no keeping
    assert done == [1, 2, 3, 4]
    for sums in kept:
        again, later = [], []
        start = Sums.from_bytes(sums.to_bytes())
        got = profile_length(model, samples, N, SINK, LEAST, settings, later.append, start=start, keep=again.append)
        assert later == done[sums.texts :]
        assert [s.losses.tobytes() for s in again] == [s.losses.tobytes() for s in kept[sums.texts :]]
        assert got.losses.tobytes() == want.losses.tobytes()
        assert got.backends == want.backends == ("torch",)


def test_sums_that_are_not_finite_are_not_kept(make) -> None:
    model, kept = make.model(), []
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    ids = [i for i in range(3, 97) if i != 5]
    good = TextSample(tuple(ids[:N] * 2)[:N], (N - 1,), (7,))
    bad = TextSample((*good.token_ids[:-1], 5), (N - 1,), (7,))
    with pytest.raises(ModelError, match="not finite"):
        profile_length(model, [good, bad, good], N, SINK, LEAST, InfluenceSettings(), keep=kept.append)
    assert [sums.texts for sums in kept] == [1]


def test_without_texts_there_is_no_profile(make) -> None:
    with pytest.raises(DataError, match="no text to profile"):
        profile_length(make.model(), [], N, SINK, LEAST, InfluenceSettings())
