"""Whatever the schedule, every request says what it says alone: tokens exactly, log-probabilities to `CLOSE`.

A batched matrix product of another shape may differ in the last bits of float32, so log-probabilities are compared to
within 1e-4; the model is sharp, so that one wrong key moves them by far more.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moa.runner.engine import Engine
from moa.runner.policies import ORDERS, POLICIES
from moa.runner.request import FinishReason, SamplingParams
from moa.runner.settings import EngineSettings

CLOSE = 1e-4
CHUNKS = (1, 7, 64, 256, None)
PLANNED = pytest.mark.parametrize("planned", [False, True], ids=["dense", "plan"])


def check(said, completion) -> None:
    """A completion is what was said alone, as far as it goes."""
    tokens, logprobs = said
    count = len(completion.tokens)
    assert list(completion.tokens) == tokens[:count]
    assert [row.token for row in completion.logprobs] == tokens[:count]
    torch.testing.assert_close(
        torch.tensor([row.logprob for row in completion.logprobs]), torch.tensor(logprobs[:count]), atol=CLOSE, rtol=0
    )


@PLANNED
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_requests_that_come_one_by_one_say_what_they_say_alone(
    make_engine, run, alone, texts, greedy, planned, policy, chunk
) -> None:
    texts = texts[::2] if chunk != 1 else texts[:14:2]
    engine = make_engine(planned, policy=policy, chunk_tokens=chunk, token_budget=chunk, max_running=8)
    done = run(engine, {3 * i: [(str(i), text, greedy)] for i, text in enumerate(texts)})
    for i, text in enumerate(texts):
        assert done[str(i)].finish is FinishReason.LENGTH
        check(alone[planned].say(text), done[str(i)])


@PLANNED
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16, 17, 33])
def test_any_batch_says_what_each_says_alone(make_engine, run, alone, texts, greedy, planned, batch) -> None:
    engine = make_engine(planned, max_running=64, token_budget=128, prefix_cache_ratio=0.0)
    done = run(engine, {0: [(str(i), texts[i % len(texts)], greedy) for i in range(batch)]})
    for i in range(batch):
        check(alone[planned].say(texts[i % len(texts)]), done[str(i)])


@PLANNED
@pytest.mark.parametrize("policy", ["sarathi", "prefill-first"])
def test_requests_that_had_to_go_lose_and_double_no_token(
    make_engine, run, alone, texts, greedy, planned, policy, token_bytes
) -> None:
    # room for the longest text and its output, and a little more
    engine = make_engine(planned, policy=policy, token_budget=48, kv_bytes=300 * token_bytes)
    done = run(engine, {i: [(str(i), text, greedy)] for i, text in enumerate(texts)})
    for i, text in enumerate(texts):
        check(alone[planned].say(text), done[str(i)])
    assert engine.stats.preemptions > 0
    assert sum(c.usage.preemptions for c in done.values()) == engine.stats.preemptions


@pytest.mark.parametrize("policy", ["orca", "request-level"])
def test_policies_that_reserve_memory_never_preempt(
    make_engine, run, alone, texts, greedy, policy, token_bytes
) -> None:
    engine = make_engine(True, policy=policy, kv_bytes=300 * token_bytes)
    done = run(engine, {0: [(str(i), text, greedy) for i, text in enumerate(texts)]})
    for i, text in enumerate(texts):
        check(alone[True].say(text), done[str(i)])
    assert engine.stats.preemptions == 0


@PLANNED
def test_a_prompt_seen_before_begins_where_it_was_left(make_engine, run, alone, texts, greedy, planned) -> None:
    engine = make_engine(planned, prefix_block_tokens=16, prefix_cache_ratio=0.5, max_running=3)
    alike = [text for text in texts if len(text) >= 64]
    for turn in range(3):
        done = run_keeping(engine, [(f"{turn}-{i}", text, greedy) for i, text in enumerate(alike)])
        for i, text in enumerate(alike):
            check(alone[planned].say(text), done[f"{turn}-{i}"])
        cached = [done[f"{turn}-{i}"].usage.cached_tokens for i in range(len(alike))]
        assert all(count < len(text) for count, text in zip(cached, alike, strict=True)), (
            "a token must be left to compute"
        )
        if turn == 2:
            assert all(count >= (len(text) - 1) // 16 * 16 for count, text in zip(cached, alike, strict=True)), cached
    assert 0 < engine.host.cache.hit_ratio < 1


def run_keeping(engine, requests):
    """Run requests to their ends; what the prefix cache keeps stays."""
    names = [engine.add(prompt, sampling, name) for name, prompt, sampling in requests]
    updates = {name: [] for name in names}
    while not engine.is_idle:
        for update in engine.step():
            updates[update.name].append(update)
    from moa.runner.request import Completion

    return {name: Completion.of(updates[name]) for name in names}


def test_the_next_turn_of_a_chat_begins_with_the_last_one(make_engine, run, alone, texts, greedy) -> None:
    engine = make_engine(True, prefix_block_tokens=16)
    first = run_keeping(engine, [("one", texts[-1], greedy)])["one"]
    again = (*texts[-1], *first.tokens, 5, 6, 7)
    second = run_keeping(engine, [("two", again, greedy)])["two"]
    check(alone[True].say(again), second)
    assert second.usage.cached_tokens == len(texts[-1]) + len(first.tokens) - 1


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, object]:
    """Who comes when, who goes when, and how the engine runs."""
    n_texts = 22
    arrivals = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, n_texts - 1)), min_size=1, max_size=12))
    cancels = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(0, len(arrivals) - 1)), max_size=4))
    return {
        "planned": draw(st.booleans()),
        "arrivals": arrivals,
        "cancels": cancels,
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "order": draw(st.sampled_from(sorted(ORDERS))),
        "token_budget": draw(st.one_of(st.none(), st.integers(1, 300))),
        "chunk_tokens": draw(st.one_of(st.none(), st.integers(1, 80))),
        "tile_tokens": draw(st.sampled_from([1, 16])),
        "max_running": draw(st.integers(1, 10)),
        "tokens_of_memory": draw(st.sampled_from([240, 320, 600, 4000])),
        "prefix_cache_ratio": draw(st.sampled_from([0.0, 0.3])),
        "prefix_block_tokens": draw(st.sampled_from([8, 16, 33])),
    }


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=schedules())
def test_random_schedules_change_no_token(model, plan, run, alone, texts, greedy, token_bytes, case) -> None:
    planned, arrivals, cancels = (case.pop(name) for name in ("planned", "arrivals", "cancels"))
    kv_bytes = case.pop("tokens_of_memory") * token_bytes
    coming: dict[int, list[tuple[str, tuple[int, ...], SamplingParams]]] = {}
    for i, (step, text) in enumerate(arrivals):
        coming.setdefault(step, []).append((str(i), texts[text], greedy))
    going: dict[int, list[str]] = {}
    for step, i in cancels:
        going.setdefault(step, []).append(str(i))
    with Engine(model, plan if planned else None, EngineSettings(kv_bytes=kv_bytes, **case)) as engine:
        done = run(engine, coming, going)
    for i, (_, text) in enumerate(arrivals):
        check(alone[planned].say(texts[text]), done[str(i)])
        reasons = (
            {FinishReason.LENGTH, FinishReason.CANCELLED} if any(j == i for _, j in cancels) else {FinishReason.LENGTH}
        )
        assert done[str(i)].finish in reasons
