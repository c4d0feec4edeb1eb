"""Documents of as much text as fits into a length, prompt and answer together."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moa.errors import DataError
from moa.eval.longtext.draft import Document, Draft, Draw, Wanted
from moa.eval.longtext.sizing import most_units

PROBE = "The special magic number is 4815162342; please remember it!"


@dataclass(frozen=True, slots=True)
class Sized:
    """Makes documents of a family whose texts have units, such as lines or words; see `Make`.

    Args:
        draw: makes a sample of so many units, the same one for the same arguments; ValueError where it cannot.
        answer_tokens: room that is left for the answer.
        least_units: fewest units that make a sample.
    """

    draw: Draw
    answer_tokens: int
    least_units: int = 1

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length_tokens: int,
        count: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> list[Document]:
        require_english(tokenizer)
        documents: list[Document] = []
        first: int | None = None
        for index in range(count):
            wanted = Wanted(length_tokens, index, count, seed, options)
            # every sample starts from the first one's size, so that none depends on those between
            units = self._most_units(tokenizer, wanted, first or self.least_units)
            if units is None:
                raise DataError(
                    f"{length_tokens} tokens are too short for this task with this tokenizer; use longer --lengths"
                )
            first = first or units
            documents.append(self._document(tokenizer, wanted, units))
        return documents

    def _most_units(self, tokenizer: PreTrainedTokenizerBase, wanted: Wanted, guess: int) -> int | None:
        def size(units: int) -> int | None:
            try:
                return tokens(tokenizer, prompt(self._draft(wanted, units))) + self.answer_tokens
            except ValueError:
                return None

        return most_units(size, wanted.length_tokens, self.least_units, guess)

    def _draft(self, wanted: Wanted, units: int) -> Draft:
        name = f"{wanted.seed}-{wanted.length_tokens}-{wanted.index}-longtext"
        return self.draw(wanted, random.Random(name), units)

    def _document(self, tokenizer: PreTrainedTokenizerBase, wanted: Wanted, units: int) -> Document:
        draft = self._draft(wanted, units)
        return {
            "index": wanted.index,
            "input": draft.input,
            "gen_prefix": draft.prefix,
            "outputs": list(draft.outputs),
            "length": tokens(tokenizer, prompt(draft)) + self.answer_tokens,
            "max_length": wanted.length_tokens,
            "depth_ratio": draft.depth_ratio,
        }


def prompt(draft: Draft) -> str:
    """What the model reads, as lm-eval puts it together."""
    return f"{draft.input} {draft.prefix}"


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a text, with what the tokenizer adds."""
    return len(tokenizer(text, verbose=False)["input_ids"])


def require_english(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that would lose an English text.

    Raises:
        DataError: it does not know the characters or words.
    """
    ids = tokenizer(PROBE, verbose=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise DataError(
            "the tokenizer cannot write English, so this task says nothing about its model; the moa_demo_* tasks are in "
            "the language of the model that ships"
        )
