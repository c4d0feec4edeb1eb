"""The engine over pages: the account keeps a pool of fixed size from ever running out, whatever the schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from moa.kernels import dispatch
from moa.runner.engine import Engine
from moa.runner.policies import POLICIES
from moa.runner.request import FinishReason, SamplingParams
from moa.runner.settings import EngineSettings

PAGE_BYTES = 2 * 64 * 16 * 4


def no_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: Any, layer: int, batch: Any, scores: Any) -> Any:
    """The pages of a step without its kernels."""
    arena, step = kv.step(layer, k, batch)
    kv.finish(layer, arena, step)
    return torch.zeros_like(q), None


CASES = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(sorted(POLICIES)),
        "token_budget": st.sampled_from([1, 50, 64, 200, None]),
        "kv_bytes": st.sampled_from([22, 26, 40, 200]).map(lambda pages: pages * PAGE_BYTES),
        "prefix_cache_ratio": st.sampled_from([0.0, 0.4]),
        "prefix_block_tokens": st.sampled_from([16, 64]),
        "max_running": st.sampled_from([2, 8]),
    }
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=CASES,
    planned=st.booleans(),
    arrivals=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 21), st.integers(1, 90)), min_size=1, max_size=9),
)
def test_pages_never_run_out(model, plan, run, texts, case, planned, arrivals) -> None:
    backend = dispatch.BACKENDS["triton"]
    dispatch.BACKENDS["triton"] = replace(backend, attend=no_kernels)
    try:
        chosen = EngineSettings(backend="triton", **case)
        with Engine(model, plan if planned else None, chosen) as engine:
            coming: dict[int, list[Any]] = {}
            for i, (step, text, tokens) in enumerate(arrivals):
                params = SamplingParams(max_tokens=tokens, ignore_eos=True)
                coming.setdefault(step, []).append((str(i), texts[text], params))
            done = run(engine, coming)
            assert {completion.finish for completion in done.values()} == {FinishReason.LENGTH}
            assert engine.stats.failed_steps == 0
    finally:
        dispatch.BACKENDS["triton"] = backend


@pytest.mark.slow
def test_pages_say_what_each_says_alone(make_engine, run, alone, texts) -> None:
    """With the kernels, in the interpreter: a prompt in chunks beside decodes, one that had to go, one from the cache."""
    greedy = SamplingParams(max_tokens=2, ignore_eos=True)
    chosen = [texts[14], texts[8], texts[14]]
    engine = make_engine(backend="triton", kv_bytes=14 * PAGE_BYTES, token_budget=50, prefix_block_tokens=32)
    done = run(engine, {2 * i: [(str(i), text, greedy)] for i, text in enumerate(chosen)})
    for i, text in enumerate(chosen):
        assert list(done[str(i)].tokens) == alone[True].say(text)[0][:2]
    assert engine.stats.failed_steps == 0
