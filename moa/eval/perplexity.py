"""Perplexity of plain text: the demo language's filler, without facts or questions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.demo import language
from moa.errors import DataError
from moa.eval.records import Perplexity
from moa.eval.scoring import score


def plain_text(tokenizer: PreTrainedTokenizerBase, n_tokens: int, name: str) -> tuple[int, ...]:
    """Exactly `n_tokens` token ids of plain text, a function of `name`.

    Raises:
        DataError: the tokenizer makes fewer tokens than there are words.
    """
    words: list[str] = []
    for sentence in language.filler(random.Random(f"{name}-perplexity")):
        words += sentence
        if len(words) >= n_tokens:  # a word has at least one token
            break
    ids = tokenizer(" ".join(words), verbose=False)["input_ids"][:n_tokens]
    if len(ids) < n_tokens:
        raise DataError(
            f"{len(words)} words made {len(ids)} tokens, wanted {n_tokens}; use a tokenizer that splits words"
        )
    return tuple(ids)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths_tokens: Sequence[int],
    *,
    texts: int = 2,
    scored_tokens: int = 1024,
    seed: int = 0,
) -> tuple[Perplexity, ...]:
    """Perplexity of the last tokens of plain texts: those with the longest context, where a plan can hurt.

    Args:
        model: a transformers causal LM, dense or with a plan applied.
        tokenizer: any tokenizer that splits at spaces.
        lengths_tokens: texts have exactly that many tokens, each at least 2.
        texts: per length, one forward call each.
        scored_tokens: at most; logits of so many positions exist at once.
        seed: of the texts, which are never those of training or calibration.

    Raises:
        DataError: a length below 2 tokens, or no text at all.
    """
    if texts < 1 or scored_tokens < 1 or min(lengths_tokens, default=2) < 2:
        raise DataError(f"perplexity needs texts of at least 2 tokens, got {texts} of {list(lengths_tokens)}")
    return tuple(_perplexity_at(model, tokenizer, n, texts, min(scored_tokens, n - 1), seed) for n in lengths_tokens)


def _perplexity_at(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n_tokens: int, texts: int, scored: int, seed: int
) -> Perplexity:
    total = 0.0
    for i in range(texts):
        ids = plain_text(tokenizer, n_tokens, f"{seed}-{n_tokens}-{i}")
        total += float(score(model, ids, range(n_tokens - scored, n_tokens))[1].double().mean())
    return Perplexity(length_tokens=n_tokens, texts=texts, scored_tokens=scored, seed=seed, nll=total / texts)
