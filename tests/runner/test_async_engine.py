"""The engine behind an event loop: streams, cancellations, slow readers, failures, and an end in any state."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from moa.errors import ResourceError, UsageError
from moa.runner.async_engine import AsyncEngine, EngineStoppedError
from moa.runner.request import Completion, FinishReason, QueueFullError, SamplingParams
from moa.runner.stats import EngineStats

LONG = SamplingParams(max_tokens=600, ignore_eos=True)


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine; its engine's thread must be gone afterwards."""
    before = threading.active_count()
    asyncio.run(asyncio.wait_for(work(), 120))
    assert threading.active_count() == before


def test_streams_say_what_each_says_alone(make_engine, alone, texts, greedy, memory_is_back) -> None:
    async def work() -> None:
        async with AsyncEngine(make_engine(True, prefix_cache_ratio=0.0)) as served:
            streams = await asyncio.gather(*(served.submit(text, greedy) for text in texts[:9]))
            done = await asyncio.gather(*(stream.completions() for stream in streams))
            for text, (completion,) in zip(texts[:9], done, strict=True):
                assert list(completion.tokens) == alone[True].say(text)[0]
            assert served.is_healthy
            assert served.queue() == (0, 0)
            assert served.stats.finished["length"] == 9
        assert not served.is_healthy
        memory_is_back(served.engine)

    in_loop(work)


def test_updates_come_one_by_one_and_tell_completions_apart(make_engine, texts) -> None:
    async def work() -> None:
        params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=3, n=3)
        async with AsyncEngine(make_engine(True)) as served:
            updates = [update async for update in await served.submit(texts[0], params, name="mine")]
            again = await (await served.submit(texts[0], params)).completions()
        assert {update.name for update in updates} == {"mine"}
        each = [Completion.of(u for u in updates if u.index == i) for i in range(3)]
        assert [c.tokens for c in each] == [c.tokens for c in again]
        assert len({c.tokens for c in each}) == 3
        assert len(updates) > 3

    in_loop(work)


def test_a_reader_that_waits_gets_its_updates_joined(make_engine, texts, greedy, alone) -> None:
    async def work() -> None:
        async with AsyncEngine(make_engine(True)) as served:
            slow = await served.submit(texts[0], greedy)
            await (await served.submit(texts[1], SamplingParams(max_tokens=100, ignore_eos=True))).completions()
            updates = [update async for update in slow]
        assert len(updates) == 1
        assert list(updates[0].tokens) == alone[True].say(texts[0])[0]
        assert len(updates[0].logprobs) == len(updates[0].tokens)

    in_loop(work)


@pytest.mark.parametrize("how", ["cancel", "leave", "raise", "by name"])
def test_who_goes_is_ended_and_others_go_on(make_engine, texts, greedy, alone, how: str) -> None:
    async def read(served: AsyncEngine, name: str) -> None:
        stream, count = await served.submit(texts[1], LONG, name), 0
        async for update in stream:
            count += len(update.tokens)
            assert count < 600
            if count >= 5:
                if how == "leave":
                    break
                if how == "raise":
                    raise ConnectionError
                (served.cancel(name) if how == "by name" else stream.cancel())
            if update.finish is not None:
                assert update.finish is FinishReason.CANCELLED

    async def work() -> None:
        async with AsyncEngine(make_engine(True)) as served:
            other = await served.submit(texts[2], greedy)
            try:
                await read(served, "gone")
            except ConnectionError:
                assert how == "raise"
            assert list((await other.completions())[0].tokens) == alone[True].say(texts[2])[0]
            while served.queue() != (0, 0):
                await asyncio.sleep(0.01)
            assert served.stats.finished == {"cancelled": 1, "length": 1}

    in_loop(work)


def test_requests_that_cannot_be_are_refused_where_they_are_made(make_engine, texts) -> None:
    async def work() -> None:
        async with AsyncEngine(make_engine(True, max_running=1, max_waiting=1)) as served:
            with pytest.raises(UsageError, match="at least 1 token"):
                await served.submit([])
            with pytest.raises(ResourceError, match=r"prompt of 2 tokens and up to 5000 more .* 1024"):
                await served.submit([1, 2], SamplingParams(max_tokens=5000))
            with pytest.raises(UsageError, match="whole numbers from 0 to 127"):
                await served.submit(["a"])  # type: ignore[list-item]
            with pytest.raises(AttributeError):  # what nobody foresaw ends in the asker, too
                await served.submit([1], 5)  # type: ignore[arg-type]
            first = await served.submit(texts[0], LONG, "same")
            with pytest.raises(UsageError, match="'same' is not finished yet"):
                await served.submit(texts[0], LONG, "same")
            with pytest.raises(QueueFullError, match="at most 1 may; try again later"):
                await asyncio.gather(*(served.submit(texts[0], LONG) for _ in range(3)))
            first.cancel()

    in_loop(work)


def test_closing_gives_time_then_cancels_and_refuses(make_engine, texts, greedy) -> None:
    async def work() -> None:
        served = AsyncEngine(make_engine(True))
        await served.start()
        short, long = await served.submit(texts[0], greedy), await served.submit(texts[1], LONG)
        closing = asyncio.create_task(served.close(drain_s=0.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineStoppedError):
            await served.submit(texts[0], greedy)
        await closing
        assert {(await s.completions())[0].finish for s in (short, long)} <= {
            FinishReason.CANCELLED,
            FinishReason.LENGTH,
        }
        assert (await long.completions() or [None])[0] is None, "a stream is read once"

        drained = AsyncEngine(make_engine(True))
        await drained.start()
        stream = await drained.submit(texts[0], greedy)
        await drained.close(drain_s=60)
        assert (await stream.completions())[0].finish is FinishReason.LENGTH

    in_loop(work)


def test_a_scheduler_that_breaks_ends_everything_with_the_reason(make_engine, texts, monkeypatch) -> None:
    async def work() -> None:
        engine = make_engine(True)
        served = AsyncEngine(engine)
        await served.start()
        streams = [await served.submit(text, LONG) for text in texts[:2]]
        monkeypatch.setattr(engine.scheduler, "next_turn", lambda now: 1 / 0)
        for stream in streams:
            (completion,) = await stream.completions()
            assert completion.finish is FinishReason.ERROR
            assert "the engine has failed: division by zero" in str(completion.error)
        with pytest.raises(EngineStoppedError, match="division by zero"):
            await served.submit(texts[0])
        assert not served.is_healthy
        await served.close()

    in_loop(work)


def test_whoever_ends_in_the_step_that_breaks_is_told(make_engine, texts, monkeypatch) -> None:
    """What a step has found out before it breaks is not lost."""

    async def work() -> None:
        engine = make_engine(True)
        served = AsyncEngine(engine)
        await served.start()

        def add(stats: EngineStats, record: object) -> None:
            if stats.finished:
                raise OSError("torn")

        monkeypatch.setattr(EngineStats, "add", add)
        short = await served.submit(texts[0], SamplingParams(max_tokens=2, ignore_eos=True))
        long = await served.submit(texts[1], LONG)
        (done,) = await asyncio.wait_for(short.completions(), 30)
        assert done.finish is FinishReason.LENGTH
        (broken,) = await asyncio.wait_for(long.completions(), 30)
        assert (broken.finish, broken.error) == (FinishReason.ERROR, "the engine has failed: torn")
        await served.close()

    in_loop(work)


def test_a_request_that_the_engine_has_lost_ends_too(make_engine, texts, monkeypatch) -> None:
    async def work() -> None:
        engine = make_engine(True)
        served = AsyncEngine(engine)
        await served.start()
        stream = await served.submit(texts[0], LONG)
        abandon = engine.abandon

        def lose(reason: str | None = None) -> list[object]:
            abandon(reason)
            if reason is not None:
                raise OSError("torn, too")
            return []

        monkeypatch.setattr(engine, "abandon", lose)
        monkeypatch.setattr(engine.scheduler, "next_turn", lambda now: 1 / 0)
        (completion,) = await asyncio.wait_for(stream.completions(), 30)
        assert (completion.finish, completion.error) == (FinishReason.ERROR, "the engine has failed: division by zero")
        await served.close()

    in_loop(work)


def test_a_step_that_hangs_is_not_healthy(make_engine, texts, greedy, monkeypatch) -> None:
    async def work() -> None:
        engine, held, go_on = make_engine(True), threading.Event(), threading.Event()
        forward = engine.packed.forward

        def stuck(*args: object) -> object:
            held.set()
            go_on.wait(60)
            return forward(*args)

        monkeypatch.setattr(engine.packed, "forward", stuck)
        async with AsyncEngine(engine, hang_s=0.05) as served:
            stream = await served.submit(texts[0], greedy)
            await asyncio.to_thread(held.wait)
            await asyncio.sleep(0.1)
            assert not served.is_healthy
            go_on.set()
            await stream.completions()
            assert served.is_healthy

    in_loop(work)


def test_a_callback_that_raises_harms_nobody(make_engine, texts, greedy, caplog) -> None:
    async def work() -> None:
        records: list[int] = []

        def on_step(record) -> None:
            records.append(record.number)
            raise RuntimeError("no metrics today")

        async with AsyncEngine(make_engine(True), on_step=on_step) as served:
            (completion,) = await (await served.submit(texts[0], greedy)).completions()
            assert completion.finish is FinishReason.LENGTH
        assert len(records) == served.stats.steps

    in_loop(work)
    assert "on_step failed" in caplog.text
