"""Answers of the dense model itself, in place of the data's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moa.devices import input_device
from moa.profile.data import TextSample

MAX_ANSWER_TOKENS = 32


def greedy(model: PreTrainedModel, max_answer_tokens: int) -> GenerationConfig:
    """How the model writes answers: its first choice each time, whatever penalties or sampling its own config asks for."""
    return GenerationConfig(
        max_new_tokens=max_answer_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else None,
        pad_token_id=0,
    )


@torch.no_grad()
def supervise(
    model: PreTrainedModel, samples: Sequence[TextSample], max_answer_tokens: int = MAX_ANSWER_TOKENS
) -> Iterator[TextSample]:
    """The samples with the dense model's own answers: its first choices where an answer is given, else what it writes."""
    for sample in samples:
        tokens = torch.tensor([sample.token_ids], device=input_device(model))  # [1, N]
        if sample.answer_positions:
            # a list: an index tensor would have to be on the last layer's device
            before: Any = [position - 1 for position in sample.answer_positions]
            logits = model(tokens, use_cache=False, logits_to_keep=before).logits[0]  # [answers, V]
            yield replace(sample, answer_ids=tuple(logits.argmax(-1).tolist()))
            continue
        written = _write(model, tokens, greedy(model, max_answer_tokens))
        yield replace(
            sample,
            token_ids=tuple(written),
            answer_positions=tuple(range(tokens.shape[1], len(written))),
            answer_ids=tuple(written[tokens.shape[1] :]),
        )


def _write(model: PreTrainedModel, tokens: Tensor, config: GenerationConfig) -> list[int]:
    """The text [1, N] and what the model adds to it."""
    generate: Any = model.generate  # its declared type is a tensor's, by way of nn.Module
    before = model.generation_config
    # in its place for a while: what a config passed to generate leaves open is taken from the model's
    model.generation_config = config
    try:
        written: list[int] = generate(tokens, attention_mask=torch.ones_like(tokens))[0].tolist()
    finally:
        model.generation_config = before
    return written
