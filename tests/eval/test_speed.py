"""What is measured is complete and the bytes are exact; how fast it is, no test says."""

from __future__ import annotations

import pytest
import torch

from moa.errors import UsageError
from moa.eval.conditions import conditions
from moa.eval.records import RecallTask
from moa.eval.speed import measure_speed
from moa.hf import apply
from moa.hf.shape import fingerprint
from moa.plan import Plan


def test_both_sides_are_measured_and_bytes_are_exact(model, plan):
    speed = measure_speed(model, plan, length_tokens=256, decode_tokens=4, rounds=2)
    assert (speed.prompt_tokens, speed.decode_tokens, speed.rounds) == (252, 4, 2)
    for side in (speed.dense, speed.sparse):
        for spread in (side.prefill_s, side.decode_tokens_per_s):
            assert 0 < spread.minimum <= spread.median <= spread.maximum
    dense_plan = Plan.uniform(plan.model, 0, 1.0)
    assert speed.dense.kv_bytes == dense_plan.kv_bytes(256) == 256 * 2 * 2 * 2 * 8 * 4
    # 64 tokens kept; storage is reserved a few tokens ahead
    assert plan.kv_bytes(256) <= speed.sparse.kv_bytes <= 1.1 * plan.kv_bytes(256)
    assert (speed.dense.attention, speed.sparse.attention) == ("sdpa", "torch")
    assert speed.density_ratio == 0.25
    assert speed.plan_sha256 == plan.sha256


def test_a_pinned_plan_is_pinned_to_the_whole_length(model, plan):
    pinned = Plan(**{**plan.model_dump(exclude={"sha256"}), "model": plan.model, "length_mode": "pinned"})
    speed = measure_speed(model, pinned, length_tokens=128, decode_tokens=3, rounds=1)
    assert pinned.kv_bytes(128) <= speed.sparse.kv_bytes <= 1.5 * pinned.kv_bytes(128)


def test_the_model_is_left_as_it_was_found(model, plan):
    model.set_attn_implementation("eager")
    try:
        measure_speed(model, plan, length_tokens=64, decode_tokens=1, rounds=1)
        assert model.config._attn_implementation == "eager"
        assert not hasattr(model, "moa")
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "options",
    [
        {"length_tokens": 8, "decode_tokens": 8},
        {"length_tokens": 8, "decode_tokens": 0},
        {"length_tokens": 64, "rounds": 0},
    ],
)
def test_what_cannot_be_measured_is_refused(model, plan, options):
    with pytest.raises(UsageError, match="cannot measure"):
        measure_speed(model, plan, **options)


def test_the_accuracy_only_backend_claims_no_speed(model, plan):
    with pytest.raises(UsageError, match="accuracy only"):
        measure_speed(model, plan, length_tokens=64, backend="reference")


def test_conditions_name_model_and_machine(model, plan, monkeypatch):
    found = conditions(model, (64, 128), name="tiny", task=RecallTask(), command="moa demo")
    assert found.model_fingerprint == fingerprint(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.environment.threads == torch.get_num_threads()
    assert found.environment.dtype == "float32"
    assert found.environment.device.startswith("cpu")
    with apply(model, plan):
        assert conditions(model, (64,), name="tiny").model_fingerprint == found.model_fingerprint
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/moa", "eval", "/home/me/tiny", "--plan=~/out"])
    told = conditions(model, (64,), name="/home/me/tiny")
    assert (told.model_name, told.command) == ("tiny", "moa eval tiny --plan=out")
