"""What the meta device says of memory is what a run on the CPU takes, and what cannot fit is refused beforehand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, LlamaForCausalLM, MistralConfig

from moa.errors import ModelError, ResourceError
from moa.profile import attention, collect, footprint
from moa.profile.collect import InfluenceSettings
from moa.profile.footprint import Footprint
from moa.profile.live_bytes import LiveBytes
from moa.profile.sweep import SpanGrid

SPANS = (8, 16)
TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SMALL = {"vocab_size": 300, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 5, "head_dim": 24}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 1 << 16}
CONFIGS = [
    LlamaConfig(**TINY, **HEADS),
    LlamaConfig(**SMALL, **HEADS),
    Gemma2Config(**TINY, **HEADS),
    MistralConfig(**TINY, **HEADS, sliding_window=64),
]


def measured(model, sample, checkpointing: bool) -> int:
    n = len(sample.token_ids)
    probe = attention.Probe(SpanGrid.for_length(n, *SPANS), "joint", 1.0, collect.uniform(0.5, *SPANS))
    with collect.profiled(model, checkpointing=checkpointing), LiveBytes() as live:
        collect.backward(model, sample, probe, InfluenceSettings())
    return live.peak


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.model_type}-{config.hidden_size}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prediction_is_what_a_run_takes(make, config, dtype, checkpointing) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for n in (257, 700):
        predicted = footprint.profile_bytes(footprint.meta_twin(model), n, SPANS, checkpointing)
        assert predicted == pytest.approx(measured(model, make.sample(n, 32), checkpointing), rel=0.05)


def test_memory_is_linear_in_the_length() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **HEADS)).eval()
    lengths = [2**i for i in range(11, 16)]
    for checkpointing in (False, True):
        sizes = [footprint.profile_bytes(model, n, SPANS, checkpointing) for n in lengths]
        for short, long in pairwise(sizes):
            assert math.log2(long / short) < 1.02


def test_checkpointing_keeps_one_input_per_layer() -> None:
    sizes = []
    for layers in (20, 30):
        with torch.device("meta"):
            config = LlamaConfig(**{**SMALL, "num_hidden_layers": layers}, **HEADS)
            model = AutoModelForCausalLM.from_config(config).eval()
        sizes.append([footprint.profile_bytes(model, 4096, SPANS, on) for on in (False, True)])
    per_layer = [(b - a) / 10 for a, b in zip(*sizes, strict=True)]
    hidden = 4096 * SMALL["hidden_size"] * 4
    assert per_layer[1] == pytest.approx(hidden, rel=0.01)
    assert per_layer[0] > 8 * per_layer[1]


def test_it_is_chosen_where_memory_is_short() -> None:
    twin = footprint.meta_twin(AutoModelForCausalLM.from_config(CONFIGS[1]))
    whole, less = (footprint.profile_bytes(twin, 2048, SPANS, on) for on in (False, True))
    assert footprint.fit(twin, 2048, SPANS, None, 2 * whole) == Footprint(whole, 2 * whole, False)
    between = (whole + less) // 2
    assert footprint.fit(twin, 2048, SPANS, None, between) == Footprint(less, between, True)
    assert footprint.fit(twin, 2048, SPANS, False, between) == Footprint(whole, between, False)
    assert footprint.fit(twin, 2048, SPANS, True, 2 * whole) == Footprint(less, 2 * whole, True)


def test_what_cannot_fit_is_refused_with_the_way_out() -> None:
    Footprint(105, 100, False).require(512)  # within the prediction's error: not for sure
    assert not Footprint(105, 100, False).fits
    assert Footprint(89, 100, False).fits
    with pytest.raises(ResourceError, match=r"profiling 512 tokens .* 3 MiB .* 2 MiB are free; use --gradient-checkp"):
        Footprint(3 << 20, 2 << 20, False).require(512)
    with pytest.raises(ResourceError, match="free; use shorter --lengths"):
        Footprint(3 << 20, 2 << 20, True).require(512)


def test_a_forward_pass_takes_less() -> None:
    twin = footprint.meta_twin(AutoModelForCausalLM.from_config(CONFIGS[1]))
    assert 0 < footprint.forward_bytes(twin, 2048, SPANS) < footprint.profile_bytes(twin, 2048, SPANS, True)


def test_live_bytes_count_what_is_made_and_forget_what_is_freed() -> None:
    for device in ("cpu", "meta"):
        there_before = torch.empty(10, 10, device=device)
        with LiveBytes() as live:
            x = torch.empty(100, dtype=torch.float32, device=device)
            y = there_before.mT @ x.view(10, 10)
            assert live.now == 800
            del y
            assert (live.now, live.peak) == (400, 800)
        del x
        assert live.now == 0


class OwnConfig(LlamaConfig):
    """A config that transformers' auto classes do not know."""

    model_type = "own"


class OwnModel(LlamaForCausalLM):
    """A user's own model."""

    config_class = OwnConfig


def test_a_class_of_the_user_s_own_is_said_to_be_unknown() -> None:
    with torch.device("meta"):
        model = OwnModel(OwnConfig(**TINY, **HEADS))
    with pytest.raises(ModelError, match="OwnModel cannot be measured without running it: Unrecognized configuration"):
        footprint.meta_twin(model)
