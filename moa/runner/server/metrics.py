"""What a server tells Prometheus and its status page; names and buckets are vLLM's, with our prefix."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from moa.runner.async_engine import AsyncEngine
from moa.runner.request import FinishReason, Update, Usage

PREFIX = "moa:"
# Latencies that the status page looks back on.
RECENT = 1024
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
WHOLE_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class Metrics:
    """Counts and latencies of requests, seen from the server.

    Args:
        served: whose queue and memory are told.
    """

    def __init__(self, served: AsyncEngine) -> None:
        self.served = served
        self.registry = CollectorRegistry()
        self.registry.register(_Counts(self))
        self.prompt_tokens = self.output_tokens = 0
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in ("ttft", "itl", "e2e")}
        self._ttft = self._histogram("time_to_first_token_seconds", "Request to first token.", TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between tokens of a request.", ITL_S)
        self._whole = self._histogram("e2e_request_latency_seconds", "Request to last token.", WHOLE_S)
        self._queue = self._histogram("request_queue_time_seconds", "Until first admitted.", WHOLE_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "Admitted to first token.", WHOLE_S)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last.", WHOLE_S)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of prompts.", TOKENS)
        self._output = self._histogram("request_generation_tokens", "Tokens generated.", TOKENS)

    @property
    def finished(self) -> dict[FinishReason, int]:
        """Completions that ended, by reason; the engine's own count, for nobody hears the end of one whose client is gone."""
        return {reason: self.served.stats.finished[reason] for reason in FinishReason}

    def count_prompt(self, tokens: int) -> None:
        """Count a prompt that was taken: once, however many completions it has."""
        self.prompt_tokens += tokens
        self._prompt.observe(tokens)

    async def watch(self, updates: AsyncIterator[Update], started_s: float) -> AsyncGenerator[Update, None]:
        """Pass on a request's updates, and count them.

        Args:
            updates: of all its completions.
            started_s: when it came, by the monotonic clock.
        """
        last: dict[int, float] = {}
        async for update in updates:
            if update.tokens:
                self._count_tokens(update, last, started_s)
            if update.finish is not None and update.usage is not None:
                self._count_end(update.finish, update.usage, started_s)
            yield update

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def percentiles(self, name: str) -> tuple[float, float] | None:
        """Median and 99th percentile in seconds of the recent "ttft", "itl" or "e2e"; None before the first."""
        if not (values := self.recent[name]):
            return None
        median, late = np.percentile(np.array(values), (50, 99))
        return float(median), float(late)

    def _count_tokens(self, update: Update, last: dict[int, float], started_s: float) -> None:
        now, before = time.monotonic(), last.get(update.index)
        last[update.index] = now
        self.output_tokens += len(update.tokens)
        if before is None:
            self._ttft.observe(now - started_s)
            self.recent["ttft"].append(now - started_s)
            return
        gap = (now - before) / len(update.tokens)  # those that came together took equally long
        for _ in update.tokens:
            self._itl.observe(gap)
        self.recent["itl"].append(gap)

    def _count_end(self, finish: FinishReason, usage: Usage, started_s: float) -> None:
        self._output.observe(usage.output_tokens)
        if usage.admitted_s is not None:
            self._queue.observe(usage.admitted_s - usage.arrived_s)
            if usage.first_token_s is not None:
                self._prefill.observe(usage.first_token_s - usage.admitted_s)
                self._decode.observe(usage.finished_s - usage.first_token_s)
        if finish in (FinishReason.STOP, FinishReason.LENGTH):
            self._whole.observe(time.monotonic() - started_s)
            self.recent["e2e"].append(time.monotonic() - started_s)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, told, buckets=buckets, registry=self.registry)


class _Counts(Collector):
    """What is read off the engine whenever somebody asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics, stats = self._metrics, self._metrics.served.stats
        running, waiting = metrics.served.queue()
        usage = 0.0 if stats.last is None else stats.last.kv_usage_ratio
        yield _gauge("num_requests_running", "Requests in memory.", running)
        yield _gauge("num_requests_waiting", "Requests in the queue.", waiting)
        yield _gauge("kv_cache_usage_perc", "Share of KV memory that is held; 1 is all.", usage)
        yield _counter("prompt_tokens", "Tokens of prompts that were taken.", metrics.prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", metrics.output_tokens)
        yield _counter("num_preemptions", "Requests taken out of memory to be computed anew.", stats.preemptions)
        ends = CounterMetricFamily(PREFIX + "request_success", "Requests that ended.", labels=["finished_reason"])
        for reason, count in metrics.finished.items():
            ends.add_metric([str(reason)], count)
        yield ends


def _gauge(name: str, told: str, value: Any) -> Metric:
    return GaugeMetricFamily(PREFIX + name, told, value=value)


def _counter(name: str, told: str, value: Any) -> Metric:
    return CounterMetricFamily(PREFIX + name, told, value=value)


__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]
