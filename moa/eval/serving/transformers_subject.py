"""What transformers itself offers for many requests, as subjects: its continuous batching, and generate() in a loop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moa.eval.serving.clock import Clock, WallClock
from moa.eval.serving.drive import Event
from moa.eval.serving.workload import Load

# Tokens of a page, transformers' own default.
PAGE_TOKENS = 256
# An id that no vocabulary has: without one, generate() takes the model's own.
NO_END = 2**31 - 1
POLL_S = 0.5


@contextmanager
def batching(model: PreTrainedModel, kv_tokens: int, token_budget: int, max_running: int) -> Iterator[BatchingSubject]:
    """transformers' continuous batching with sdpa, running until the block ends; the model is left as it was.

    Args:
        model: a transformers causal LM.
        kv_tokens: that its cache holds.
        token_budget: tokens of a step at most.
        max_running: requests of a step at most.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    wanted = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=-(-kv_tokens // PAGE_TOKENS),
        max_batch_tokens=token_budget,
        max_requests_per_batch=max_running,
        allow_block_sharing=False,  # prompts have nothing in common
        auto_switch_to_flash=False,
    )
    offering: Any = model  # typed as a tensor by torch
    manager = offering.init_continuous_batching(_greedy(), continuous_batching_config=wanted)
    manager.start()
    try:
        yield BatchingSubject(manager)
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
        model.set_attn_implementation(before)


class BatchingSubject:
    """transformers' continuous batching, whose own times of tokens are taken: its thread runs beside the load generator."""

    name = "transformers, continuous batching"
    about: Mapping[str, object] = MappingProxyType({"plan": "dense", "attention": "sdpa"})

    def __init__(self, manager: Any) -> None:
        self.clock: Clock = WallClock()
        self._manager = manager
        self._told: dict[int, int] = {}

    def submit(self, request: int, load: Load) -> None:
        """Queue a request."""
        self._told[request] = 0
        self._manager.add_request(
            list(load.prompt),
            request_id=str(request),
            max_new_tokens=load.output_tokens,
            record_timestamps=True,
            eos_token_id=NO_END,
        )

    def events(self, until_s: float) -> list[Event]:
        """What the thread has put out."""
        result = self._manager.get_result(timeout=min(POLL_S, max(0.0, until_s - self.clock())))
        if result is None:
            if not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped; its log says why")
            return []
        request = int(result.request_id)
        if request not in self._told:
            return []
        times = (result.timestamps or [])[self._told[request] :]
        self._told[request] += len(times)
        events = [Event(request, at, 1) for at in times]  # its clock and ours are the same on Linux
        if result.is_finished():
            del self._told[request]
            events.append(Event(request, self.clock(), 0, is_last=True, error=result.error or ""))
        return events

    def cancel_all(self) -> None:
        """Cancel what is open."""
        for request in self._told:
            self._manager.cancel_request(str(request))
        self._told.clear()


class LoopSubject:
    """generate() for one request after the other, in order of arrival.

    Args:
        model: a transformers causal LM.
        clock: seconds for waiting.
    """

    name = "transformers, generate() in a loop"
    about: Mapping[str, object] = MappingProxyType({"plan": "dense", "attention": "sdpa"})

    def __init__(self, model: PreTrainedModel, clock: Clock | None = None) -> None:
        self.clock = clock or WallClock()
        self._model: Any = model  # typed as a tensor by torch
        self._waiting = deque[tuple[int, Load]]()

    def submit(self, request: int, load: Load) -> None:
        """Queue a request."""
        self._waiting.append((request, load))

    def events(self, until_s: float) -> list[Event]:
        """A whole request, with the time of each of its tokens."""
        if not self._waiting:
            if math.isinf(until_s):
                raise RuntimeError("generate() has nothing to do, yet some requests have not ended")
            self.clock.wait_until(until_s)
            return []
        request, load = self._waiting.popleft()
        times = _Times(self.clock)
        prompt = torch.tensor([load.prompt])  # [1, N]
        with torch.no_grad():
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=_greedy(load.output_tokens),
                streamer=times,
            )
        return [Event(request, at, 1, is_last=i == len(times.times) - 1) for i, at in enumerate(times.times)]

    def cancel_all(self) -> None:
        """Forget what waits."""
        self._waiting.clear()


class _Times(BaseStreamer):
    """When each token came."""

    def __init__(self, clock: Clock) -> None:
        self.times: list[float] = []
        self._clock, self._has_prompt = clock, False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.times.append(self._clock())
        self._has_prompt = True

    def end(self) -> None:
        pass


def _greedy(tokens: int = 1) -> GenerationConfig:
    """Exactly so many greedy tokens."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=tokens, min_new_tokens=None, eos_token_id=NO_END, pad_token_id=0
    )
