"""The cost model finds what a machine does, and the budget it gives keeps the time between tokens, also when it was wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import ResourceError, UsageError
from moa.runner.account import Footprint
from moa.runner.cost_model import HEADROOM_SHARE, LEAST_CHUNK_TOKENS, BudgetTuner, CostModel, step_work
from moa.runner.policies import Job
from moa.runner.request import SamplingParams
from moa.spans import BETA_ONE, SpanRules

HALF = SpanRules(np.zeros((1, 2), np.int64), np.array([[BETA_ONE, 0]]), sink_tokens=0, min_span_tokens=10)
FOOTPRINT = Footprint(HALF)
TRUE_SECONDS = np.array([5e-3, 1e-4, 2e-4, 1e-7, 2e-8])


def job(computed: int, decoding: bool) -> Job:
    return Job(order=0, arrived_s=0, known_tokens=10_000, most_cached_tokens=10_000, computed_tokens=computed,
               is_decoding=decoding)  # fmt: skip


def test_work_counts_what_spans_leave() -> None:
    parts = [(job(100, True), 1), (job(0, False), 20), (job(50, False), 1)]
    one, prompt, decodes, keys, pairs = step_work(parts, FOOTPRINT).tolist()
    assert (one, prompt, decodes) == (1, 21, 1)
    assert keys == (110 + 111) / 4  # a dense head and one of 10 tokens, before and after
    assert pairs == 20 * (0 + 30) / 4 + 1 * (60 + 61) / 4


def steps(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            step_work(
                [(job(int(c), True), 1) for c in rng.integers(1, 4000, rng.integers(0, 32))]
                + [(job(int(rng.integers(0, 4000)), False), int(rng.integers(1, 512)))],
                FOOTPRINT,
            )
            for _ in range(count)
        ]
    )


def test_a_fit_finds_the_machine_and_says_how_far_off_it_is() -> None:
    work = steps(40)
    exact = CostModel.fit(work, work @ TRUE_SECONDS)
    np.testing.assert_allclose(exact.seconds_per, TRUE_SECONDS, rtol=1e-6)
    assert exact.worst_error_ratio < 1e-9
    noise = np.random.default_rng(1).uniform(0.9, 1.1, 40)
    noisy = CostModel.fit(work, work @ TRUE_SECONDS * noise)
    assert 0.02 < noisy.worst_error_ratio < 0.2
    assert (noisy.seconds_per >= 0).all()
    flat = work.copy()
    flat[:, 3] = 0  # nothing of a kind was measured
    assert np.isfinite(CostModel.fit(flat, flat @ TRUE_SECONDS).seconds_per).all()


@given(
    st.lists(st.integers(1, 5000), max_size=40),
    st.integers(0, 5000),
    st.floats(0.5, 200),
    st.sampled_from([1, 64]),
)
def test_a_budget_keeps_the_time_and_is_the_largest_that_does(contexts, start, tbt_ms, tile) -> None:
    tuner = BudgetTuner(CostModel(TRUE_SECONDS, 0.0), FOOTPRINT, tbt_ms / 1000, tile, most_tokens=1024)
    running = [job(context, True) for context in contexts] + [job(start, False)]
    budget = tuner.budget(running, None)

    def seconds(total: int) -> float:
        parts = [(each, 1) for each in running[:-1]] + [(running[-1], total - len(contexts))]
        return float(tuner.model.seconds(step_work(parts, FOOTPRINT)))

    unit = max(tile, LEAST_CHUNK_TOKENS)
    if not contexts:
        assert budget == 1024
        return
    assert budget >= len(contexts) + min(LEAST_CHUNK_TOKENS, budget - len(contexts))
    if budget > len(contexts) + LEAST_CHUNK_TOKENS:
        assert seconds(budget) <= tbt_ms / 1000 * HEADROOM_SHARE
        assert budget % unit == 0
    longer = budget // unit * unit + unit
    if longer <= 1024 and longer > len(contexts):
        assert seconds(longer) > tbt_ms / 1000 * HEADROOM_SHARE


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_a_machine_that_is_not_what_was_measured_is_learnt(slower: float) -> None:
    tuner = BudgetTuner(CostModel(TRUE_SECONDS, 0.0), FOOTPRINT, 0.05)
    running, took, budgets = [job(500, True), job(0, False)], [], []
    for _ in range(200):
        budget = tuner.budget(running, None)
        work = step_work([(running[0], 1), (running[1], budget - 1)], FOOTPRINT)
        took.append(float(work @ TRUE_SECONDS) * slower)
        budgets.append(budget)
        tuner.observe(work, took[-1])
    assert max(took[100:]) <= 0.05
    assert min(took[100:]) > 0.6 * 0.05 or budgets[-1] == 2048
    tuner.observe(work, 1e6)  # a machine that slept
    assert tuner.correction_ratio < slower * 1.1


def test_a_time_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="above 0 ms"):
        BudgetTuner(CostModel(TRUE_SECONDS, 0.0), FOOTPRINT, 0.0)


@pytest.mark.parametrize("planned", [False, True])
def test_an_engine_measures_itself_and_changes_no_token(make_engine, run, alone, texts, greedy, planned) -> None:
    engine = make_engine(planned, token_budget="auto", tbt_ms=3.0)
    assert engine.host.memory.sequences == ()
    assert (engine.tuner.model.seconds_per >= 0).all()
    done = run(engine, {2 * i: [(str(i), text, greedy)] for i, text in enumerate(texts)})
    for i, text in enumerate(texts):
        assert list(done[str(i)].tokens) == alone[planned].say(text)[0]
    assert engine.tuner.correction_ratio != 1.0


@pytest.mark.parametrize("options", [{"token_budget": "auto"}, {"tbt_ms": 5.0}])
def test_a_budget_and_a_time_go_together(make_engine, options) -> None:
    with pytest.raises(UsageError, match="go together"):
        make_engine(True, **options)


def test_too_little_memory_to_measure_in_is_said(make_engine, token_bytes) -> None:
    with pytest.raises(ResourceError, match="too little KV memory to measure"):
        make_engine(False, token_budget="auto", tbt_ms=5.0, kv_bytes=100 * token_bytes)
    make_engine(False).generate([[1, 2]], SamplingParams(max_tokens=2))  # the model is free again
