"""The dense model's own answers: its first choices, whatever its config asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from moa.profile.data import TextSample
from moa.profile.supervise import supervise

MOST = 12


@pytest.fixture
def model(make):
    return make.model()


def choices(model, sample: TextSample) -> tuple[int, ...]:
    with torch.no_grad():
        logits = model(torch.tensor([sample.token_ids])).logits[0]
    return tuple(logits[torch.tensor(sample.answer_positions) - 1].argmax(-1).tolist())


def test_given_answers_become_the_model_s_first_choices(make, model) -> None:
    given = make.sample(50)
    (supervised,) = supervise(model, [given], MOST)
    assert supervised == replace(given, answer_ids=choices(model, given))
    assert supervised.answer_ids != given.answer_ids


def test_no_index_is_tied_to_the_first_layer_s_device(make, model) -> None:
    """A model spread over several GPUs picks its last hidden states on another one than its tokens are on."""
    kept = []
    hook = model.register_forward_pre_hook(lambda _, __, given: kept.append(given["logits_to_keep"]), with_kwargs=True)
    [*supervise(model, [make.sample(50)], MOST)]
    hook.remove()
    assert kept == [[46, 47, 48]]


def test_open_questions_get_what_the_model_writes(make, model) -> None:
    asked = TextSample(make.sample(40).token_ids, (), (), truncated_tokens=7)
    (written,) = supervise(model, [asked], MOST)
    assert written.token_ids[:40] == asked.token_ids
    assert written.truncated_tokens == 7
    assert written.answer_positions == tuple(range(40, len(written.token_ids)))
    assert (
        tuple(written.token_ids[p] for p in written.answer_positions) == written.answer_ids == choices(model, written)
    )
    assert len(written.answer_ids) <= MOST


def test_the_model_s_own_way_of_writing_does_not_count(make, model) -> None:
    """Penalties and sampling would make answers that the model's first choices are not."""
    asked = TextSample(make.sample(40).token_ids, (), ())
    (plain,) = supervise(model, [asked], MOST)
    model.generation_config = GenerationConfig(
        repetition_penalty=50.0, no_repeat_ngram_size=1, min_new_tokens=MOST, do_sample=True, temperature=9.0
    )
    assert [*supervise(model, [asked], MOST)] == [plain]


def test_an_answer_ends_where_the_model_ends_it(make, model) -> None:
    asked = TextSample(make.sample(40).token_ids, (), ())
    (plain,) = supervise(model, [asked], MOST)
    last = plain.answer_ids[2]
    model.generation_config.eos_token_id = last
    (ended,) = supervise(model, [asked], MOST)
    assert ended.answer_ids == plain.answer_ids[: plain.answer_ids.index(last) + 1]
