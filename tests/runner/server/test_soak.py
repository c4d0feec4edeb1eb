"""Load for a while, with clients that cancel, leave and err: nothing grows, and all memory is back at the end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import re
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest

WORDS = "boris came to the harbour and nadia left the old castle . the dog follows anna . ".split()
MINUTES = float(os.environ.get("MOA_SOAK_MINUTES", "30"))
SAMPLE_S = 5.0
# Of what is not freed to the system at once, by any allocator, whatever the load.
SLACK_BYTES = 24 << 20


class Clients:
    """Many clients, each of which does something else every time."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.random, self.done = url, random.Random(seed), {}

    async def run(self, seconds: float, rate: float) -> None:
        """Random arrivals, `rate` a second."""
        end = time.monotonic() + seconds
        limits = httpx2.Limits(max_connections=64)
        async with (
            httpx2.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            while time.monotonic() < end:
                act = self.random.choice(
                    [self.ask, self.ask, self.stream, self.leave, self.cancel, self.err, self.look]
                )
                group.create_task(self.count(act, client))
                await asyncio.sleep(self.random.expovariate(rate))

    async def count(self, act, client) -> None:
        await act(client)
        self.done[act.__name__] = self.done.get(act.__name__, 0) + 1

    def body(self, **fields) -> dict:
        prompt = " ".join(self.random.choices(WORDS, k=self.random.choice([1, 5, 40, 200])))
        some = {"max_tokens": self.random.randrange(1, 60), "n": self.random.choice([1, 1, 1, 3])}
        some |= {"temperature": self.random.choice([0, 1]), "logprobs": self.random.choice([None, 0, 5])}
        return {"prompt": prompt, **some, "echo": self.random.random() < 0.2, **fields}

    async def ask(self, client) -> None:
        answer = await client.post("/v1/completions", json=self.body())
        assert answer.status_code in (200, 503), answer.text

    async def stream(self, client) -> None:
        async with client.stream("POST", "/v1/completions", json=self.body(stream=True)) as answer:
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
            assert answer.status_code == 503 or last == "data: [DONE]"

    async def leave(self, client) -> None:
        left = self.random.randrange(6)
        async with client.stream("POST", "/v1/completions", json=self.body(stream=True, max_tokens=500)) as answer:
            async for _ in answer.aiter_lines():
                left -= 1
                if left < 0:
                    break

    async def cancel(self, client) -> None:
        asking = asyncio.create_task(client.post("/v1/completions", json=self.body(max_tokens=500)))
        await asyncio.sleep(self.random.random() * 0.3)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def err(self, client) -> None:
        wrong = self.random.choice([{"n": 0}, {"prompt": [5] * 5000}, {"nothing": 1}, {"logit_bias": {"a": 1}}])
        assert (await client.post("/v1/completions", json=self.body(**wrong))).status_code in (400, 503)

    async def look(self, client) -> None:
        for path in ("/", "/metrics", "/health", "/v1/models"):
            assert (await client.get(path)).status_code == 200


def anonymous_bytes() -> int:
    """Of this process, in memory or swapped out."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(kib) for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+)", status, flags=re.MULTILINE))


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def load(server, seconds: float, seed: int, rate: float = 25) -> dict[str, int]:
    clients = Clients(server.url, seed)
    asyncio.run(clients.run(seconds, rate))
    server.wait_idle()
    gc.collect()
    return clients.done


@pytest.fixture
def small(serve):
    """A server whose KV memory is short, so that requests wait and are taken out again."""
    return serve(engine={"kv_bytes": 192 * 1024, "max_running": 12, "max_waiting": 64}, requests=48)


def check_all_is_back(server, threads: int, fds: int) -> None:
    engine = server.service.served.engine
    engine.host.clear()
    assert (engine.host.account.used_slots, engine.host.account.holders) == (0, 0)
    assert engine.host.memory.kv_bytes == 0
    assert not engine._live
    assert not server.service.served._streams
    assert threading.active_count() <= threads
    assert handles() <= fds + 2  # keep-alive connections that are on their way out


def test_a_few_seconds_of_everything(small):
    load(small, 2, seed=0)
    threads, fds = threading.active_count(), handles()
    done = load(small, 6, seed=1)
    assert set(done) == {"ask", "stream", "leave", "cancel", "err", "look"}
    finished = small.service.served.stats.finished
    assert finished["cancelled"] > 0
    assert finished["length"] > 0
    assert not finished["error"]
    check_all_is_back(small, threads, fds)


@pytest.mark.soak
def test_half_an_hour_of_everything(small):
    """`MOA_SOAK_MINUTES=5 pytest -m soak`: for another time."""
    load(small, 60 * MINUTES * 0.2, seed=0)
    threads, fds, times, sizes = threading.active_count(), handles(), [], []
    end = time.monotonic() + 60 * MINUTES * 0.8
    while time.monotonic() < end:
        load(small, SAMPLE_S, seed=len(times) + 1)
        times.append(time.monotonic())
        sizes.append(anonymous_bytes())
    slope, _ = np.polyfit(times, sizes, 1)  # bytes per second
    grown = slope * (times[-1] - times[0])
    told = f"{grown / 2**20:.1f} MiB grown of {sizes[0] / 2**20:.0f}: {small.service.served.stats}"
    logging.getLogger(__name__).info(told)  # --log-cli-level=INFO shows it
    assert grown < SLACK_BYTES, told
    check_all_is_back(small, threads, fds)
    assert small.service.served.stats.preemptions > 0
