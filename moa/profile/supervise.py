"""Answers of the dense model itself, in place of the data's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from moa.profile.data import TextSample

GENERATED_ANSWER_TOKENS = 32


@torch.no_grad()
def supervise(model: PreTrainedModel, samples: Sequence[TextSample]) -> Iterator[TextSample]:
    """The samples with the dense model's own answers: its first choices where an answer is given, else what it writes."""
    for sample in samples:
        tokens = torch.tensor([sample.token_ids], device=model.device)
        if sample.answer_positions:
            before = torch.tensor(sample.answer_positions, device=model.device) - 1
            logits = model(tokens, use_cache=False, logits_to_keep=before).logits[0]  # [answers, V]
            yield replace(sample, answer_ids=tuple(logits.argmax(-1).tolist()))
            continue
        generate: Any = model.generate  # its declared type is a tensor's, by way of nn.Module
        # a config of our own: the model's may ask for penalties or sampling
        greedy = GenerationConfig(
            max_new_tokens=GENERATED_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=model.generation_config.eos_token_id if model.generation_config else None,
            pad_token_id=0,
        )
        written = generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)[0].tolist()
        positions = range(tokens.shape[1], len(written))
        yield replace(
            sample,
            token_ids=tuple(written),
            answer_positions=tuple(positions),
            answer_ids=tuple(written[tokens.shape[1] :]),
        )
