"""Long plain text whose last part is scored, with everything before it as context."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moa.demo import language
from moa.errors import DataError
from moa.eval.longtext import prose
from moa.eval.longtext.draft import Document
from moa.eval.longtext.sized import require_english, tokens
from moa.eval.longtext.sizing import most_units

SCORED_TOKENS = 1024
Sentences = Callable[[str], Iterator[str]]


def english(
    tokenizer: PreTrainedTokenizerBase, length_tokens: int, count: int, seed: int, options: Mapping[str, Any]
) -> list[Document]:
    """Generated prose, or the sentences of `text_file`, one document after the other; see `Make`."""
    require_english(tokenizer)
    if not options.get("text_file"):
        return [_document(tokenizer, prose.sentences, length_tokens, i, seed) for i in range(count)]
    supplied = _sentences_of(str(options["text_file"]))
    return [_document(tokenizer, partial(_part, supplied, i, count), length_tokens, i, seed) for i in range(count)]


def demo(
    tokenizer: PreTrainedTokenizerBase, length_tokens: int, count: int, seed: int, options: Mapping[str, Any]
) -> list[Document]:
    """Text in the language of the model that ships; see `Make`."""
    return [_document(tokenizer, _demo_sentences, length_tokens, i, seed) for i in range(count)]


def _demo_sentences(name: str) -> Iterator[str]:
    return (" ".join(words) for words in language.filler(random.Random(f"{name}-perplexity")))


def _sentences_of(path: str) -> list[str]:
    try:
        return prose.split_sentences(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _part(sentences: list[str], index: int, count: int, name: str) -> Iterator[str]:
    """The sentences from a share of a text on."""
    return iter(sentences[len(sentences) * index // count :])


def _document(
    tokenizer: PreTrainedTokenizerBase, sentences: Sentences, length_tokens: int, index: int, seed: int
) -> Document:
    """The longest text that fits, cut into context and scored part between two sentences."""
    drawn = sentences(f"{seed}-{length_tokens}-{index}")
    parts: list[str] = [*islice(drawn, length_tokens // 2)]  # no sentence is shorter than two tokens

    def size(units: int) -> int | None:
        return tokens(tokenizer, " ".join(parts[:units])) if units <= len(parts) else None

    units = most_units(size, length_tokens, 2, length_tokens // 16)
    if units is None or units == len(parts):
        raise DataError(f"there is no text of {length_tokens} tokens here; use other --lengths, or a longer text_file")
    room = min(SCORED_TOKENS, length_tokens // 2)
    scored = most_units(lambda n: tokens(tokenizer, " ".join(parts[units - n : units])), room, 1, room // 16)
    cut = units - min(scored or 1, units - 1)
    context, target = " ".join(parts[:cut]), " " + " ".join(parts[cut:units])
    total = tokens(tokenizer, context + target)
    return {
        "index": index,
        "input": context,
        "target": target,
        "tokens": total - tokens(tokenizer, context),
        "length": total,
        "max_length": length_tokens,
        "depth_ratio": None,
    }
