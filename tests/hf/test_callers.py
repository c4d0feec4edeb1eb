"""What else calls a model finds the plan at work: Trainer.evaluate, streamers, logits_to_keep; assistants are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from moa.errors import ModelError
from moa.hf import apply


def test_trainer_evaluates_under_the_plan(model, plan, prompts, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in prompts]
    trainer = Trainer(model=model, args=arguments, eval_dataset=rows)
    dense = trainer.evaluate()["eval_loss"]
    with apply(model, plan), torch.no_grad():
        want = model(prompts, labels=prompts).loss.item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    assert dense != pytest.approx(want, rel=1e-5)


def test_a_streamer_gets_the_tokens_as_they_come(model, plan, prompts, make) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    with apply(model, plan):
        streamer = Streamer()
        out = model.generate(prompts[:1], **make.greedy, streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), -1]


def test_the_last_logits_alone_are_those_of_all(model, plan, prompts) -> None:
    with apply(model, plan), torch.no_grad():
        torch.testing.assert_close(model(prompts, logits_to_keep=2).logits, model(prompts).logits[:, -2:])


def test_an_assistant_is_refused_under_a_plan_and_not_when_disabled(model, plan, prompts, make) -> None:
    options = {**make.greedy, "max_new_tokens": 5, "assistant_model": make.model()}
    with apply(model, plan) as attachment:
        with pytest.raises(ModelError, match="assisted decoding needs the dense model"):
            model.generate(prompts[:1], **options)
        with attachment.disabled():
            assert model.generate(prompts[:1], **options).shape == (1, 155)
