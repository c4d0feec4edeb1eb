"""Answers from a prompt whose cache was compressed after a dense prefill: what lm-eval asks, with that step in between.

The prompt's last token is computed after the compression, not before, so that every token of an answer is decided by what
was kept; else the first one would still see everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Compressed(Protocol):
    """A compressed prompt: its cache, and whether later tokens must come one at a time."""

    @property
    def cache(self) -> DynamicCache: ...
    @property
    def one_by_one(self) -> bool: ...


# From ids, int64 [1, n], to what is kept of them
Prefill = Callable[[Tensor], Compressed]


class Answering:
    """A prompt that is compressed when the first token after it is asked for.

    Args:
        model: a transformers causal LM.
        prefill: computes and compresses a prompt.
        prompt: token ids, at least one.
    """

    def __init__(self, model: PreTrainedModel, prefill: Prefill, prompt: Sequence[int]) -> None:
        self._model, self._seen = model, len(prompt) - 1
        self._last = prompt[-1]
        kept = prefill(self._ids(prompt[:-1])) if self._seen else None
        self._cache = kept.cache if kept else DynamicCache()
        self._one_by_one = kept.one_by_one if kept else False

    def logits(self, continuation: Sequence[int]) -> Tensor:
        """What predicts each token of a continuation: logits [K, V]."""
        tokens = [self._last, *continuation[:-1]]
        steps = [[token] for token in tokens] if self._one_by_one else [tokens]
        return torch.cat([self._step(step) for step in steps])

    def greedy(self, max_tokens: int, stop: Callable[[Sequence[int]], bool]) -> list[int]:
        """The likeliest next tokens, up to and with the one after which `stop` of them is true."""
        answer: list[int] = []
        step = [self._last]
        while len(answer) < max_tokens and not (answer and stop(answer)):
            step = [int(self._step(step)[-1].argmax())]
            answer += step
        return answer

    def _step(self, tokens: Sequence[int]) -> Tensor:
        """Logits [T, V] of the next tokens, at the positions that they have in the whole text."""
        positions = torch.arange(self._seen, self._seen + len(tokens), device=self._model.device)[None]  # [1, T]
        self._seen += len(tokens)
        with torch.no_grad():
            logits: Tensor = self._call(self._ids(tokens), positions).logits[0]  # [T, V]
        return logits

    def _call(self, ids: Tensor, positions: Tensor) -> Any:
        return self._model(input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.long, device=self._model.device)  # [1, T]
