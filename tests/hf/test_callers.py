"""What else calls a model finds the plan at work: pipelines, Trainer, streamers, accelerate; assistants are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from moa.errors import ModelError
from moa.hf import apply
from moa.plan import load_plan


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


@pytest.fixture
def speaking(make):
    """A model that knows the demo tokenizer's words, with a plan and a pipeline of it."""
    from moa.demo.tokenizer import build_tokenizer

    model, tokenizer = make.model(vocab_size=400), build_tokenizer()
    tokenizer.padding_side = "left"
    return model, make.plan(model), pipeline("text-generation", model=model, tokenizer=tokenizer)


SAYING = {"max_new_tokens": 6, "return_full_text": False}


def test_a_pipeline_generates_under_the_plan(speaking) -> None:
    """Made before or after, alone or in a padded batch; several sequences of one prompt, too."""
    model, plan, speak = speaking
    texts = ["the old cart blocks the wheel . " * 12, "anna came to the mill . " * 9]
    dense = [speak(text, do_sample=False, **SAYING) for text in texts]
    with apply(model, plan) as attached:
        alone = [speak(text, do_sample=False, **SAYING) for text in texts]
        after = pipeline("text-generation", model=model, tokenizer=speak.tokenizer)
        assert speak(texts, do_sample=False, batch_size=2, **SAYING) == alone
        assert after(texts, do_sample=False, batch_size=2, **SAYING) == alone
        assert alone[0] != dense[0]
        torch.manual_seed(0)
        drawn = speak(texts[0], do_sample=True, num_return_sequences=3, **SAYING)
        assert len({each["generated_text"] for each in drawn}) == 3
        assert attached.kv_bytes < attached.dense_kv_bytes
        with attached.disabled():
            assert [speak(text, do_sample=False, **SAYING) for text in texts] == dense
    assert [speak(text, do_sample=False, **SAYING) for text in texts] == dense


@pytest.mark.parametrize("sampling", [False, True])
def test_several_sequences_of_a_prompt_are_those_of_the_reference(model, plan, prompts, make, sampling: bool) -> None:
    options = {**make.greedy, "num_beams": 4, "num_return_sequences": 3, "do_sample": sampling}
    outs = []
    for backend in ("reference", "torch"):
        torch.manual_seed(3)
        with apply(model, plan, backend=backend):
            outs.append(model.generate(prompts, **options))
    assert outs[0].shape == (6, 190)
    assert torch.equal(*outs)


@pytest.mark.parametrize("place", ["auto", "cpu", "disk"])
def test_a_model_that_accelerate_has_placed_runs_as_itself(model, plan, prompts, make, place, tmp_path: Path) -> None:
    """With `device_map`; layers that lie on disk are fetched by hooks of accelerate's, which stay."""
    model.save_pretrained(tmp_path / "model")
    with apply(model, plan):
        want = model.generate(prompts, **make.greedy)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    where = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"} if place == "disk" else place
    options = {"dtype": "auto", "device_map": where, "offload_folder": str(tmp_path / "offloaded")}
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
    before, dense = make.traces(placed), placed.generate(prompts, **make.greedy)
    with apply(placed, plan) as attached:
        assert torch.equal(placed.generate(prompts, **make.greedy), want)
        assert attached.kv_bytes < attached.dense_kv_bytes
    assert make.traces(placed) == before
    assert torch.equal(placed.generate(prompts, **make.greedy), dense)
    assert not torch.equal(dense, want)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_under_the_plan_and_saves_it(model, plan, prompts, bf16: bool, tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, bf16=bf16, report_to=[], disable_tqdm=True, **options)
    rows = [{"input_ids": row, "labels": row} for row in prompts]
    with apply(model, plan), torch.no_grad():
        before = model(prompts, labels=prompts).loss
        with torch.enable_grad():
            Trainer(model=model, args=arguments, train_dataset=rows).train()
        assert model.eval()(prompts, labels=prompts).loss < before
    assert load_plan(tmp_path / "checkpoint-2") == plan
