"""Perplexity against a direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from moa.demo import language
from moa.errors import DataError
from moa.eval.perplexity import perplexity, plain_text
from moa.hf import apply


def test_it_equals_a_direct_computation_over_all_logits(model, tokenizer):
    (found,) = perplexity(model, tokenizer, (96,), texts=2)
    assert found.scored_tokens == 95
    losses = []
    for i in range(2):
        ids = torch.tensor([plain_text(tokenizer, 96, f"0-96-{i}")])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    assert found.nll == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_an_oracle_is_never_surprised_and_only_the_end_counts(oracle, tokenizer):
    assert perplexity(oracle(), tokenizer, (128,))[0].perplexity < 1.05
    beginner = oracle(lambda position, n: position < n - 16)
    assert perplexity(beginner, tokenizer, (128,), scored_tokens=16)[0].perplexity < 1.05
    assert perplexity(beginner, tokenizer, (128,), scored_tokens=17)[0].perplexity > 1.05


def test_texts_have_no_facts_and_exactly_the_length(tokenizer):
    words = tokenizer.convert_ids_to_tokens(list(plain_text(tokenizer, 200, "0-200-0")))
    assert len(words) == 200
    assert not set(words) & {*language.KEYS, *language.VALUES}
    assert plain_text(tokenizer, 200, "a") != plain_text(tokenizer, 200, "b")


def test_it_is_deterministic_and_sees_a_plan(model, tokenizer, plan):
    dense = perplexity(model, tokenizer, (128,))
    assert perplexity(model, tokenizer, (128,)) == dense
    with apply(model, plan):
        assert perplexity(model, tokenizer, (128,)) != dense


@pytest.mark.parametrize(("lengths", "texts"), [((1,), 2), ((64,), 0)])
def test_what_has_no_perplexity_is_refused(model, tokenizer, lengths, texts):
    with pytest.raises(DataError, match="at least 2 tokens"):
        perplexity(model, tokenizer, lengths, texts=texts)
