"""Scores at chosen positions against all logits."""

from __future__ import annotations

import pytest
import torch

from moa.errors import DataError, ModelError
from moa.eval.scoring import answer_loss, score
from moa.profile.data import TextSample
from moa.profile.supervise import supervise
from moa.profile.synthetic import synthetic_samples


def test_scores_equal_those_of_all_logits(model):
    ids = torch.arange(5, 45)
    choices, losses = score(model, ids.tolist(), (1, 17, 39))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    at = torch.tensor((1, 17, 39))
    assert choices.tolist() == logits[at - 1].argmax(-1).tolist()
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits[at - 1], ids[at], reduction="none"))


def test_no_index_is_tied_to_the_first_layer_s_device(model) -> None:
    """A model spread over several GPUs picks its last hidden states on another one than its tokens are on."""
    kept = []
    hook = model.register_forward_pre_hook(lambda _, __, given: kept.append(given["logits_to_keep"]), with_kwargs=True)
    score(model, list(range(5, 25)), (7, 9))
    hook.remove()
    assert kept == [[6, 8]]


def test_other_wanted_tokens_are_scored_in_place_of_the_texts(model):
    ids = list(range(5, 25))
    choices, own = score(model, ids, (7, 9))
    _, best = score(model, ids, (7, 9), choices.tolist())
    assert (best <= own).all()
    assert (best < own).any()


def test_answer_loss_is_the_mean_over_all_answer_tokens(model):
    texts = (
        TextSample((3, 4, 5, 6), (2,), (5,)),
        TextSample((7, 8, 9, 10), (1, 3), (8, 11)),
        TextSample((1, 2), (), ()),
    )
    losses = [*score(model, (3, 4, 5, 6), (2,))[1], *score(model, (7, 8, 9, 10), (1, 3), (8, 11))[1]]
    assert answer_loss(model, texts) == pytest.approx(float(sum(losses)) / 3)


def test_the_models_own_choices_cost_least(model, tokenizer):
    texts = synthetic_samples(tokenizer, 256, 2, seed=0)
    assert answer_loss(model, tuple(supervise(model, texts))) < answer_loss(model, texts)


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(DataError, match=r"\[1, 3\)"):
        score(model, (1, 2, 3), (0,))
    with pytest.raises(ModelError, match="takes no logits_to_keep"):
        score(model.model, (1, 2, 3), (1,))
    with pytest.raises(DataError, match="none of the 1 texts has an answer"):
        answer_loss(model, (TextSample((1, 2), (), ()),))
