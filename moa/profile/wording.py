"""The demo's language in words that a tokenizer can write: other words for those it would lose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerBase

from moa.demo import language
from moa.errors import DataError

BATCH = 1024


@dataclass(frozen=True, slots=True)
class Wording:
    """How words become a text: what stands between them, and what stands in for words that the tokenizer does not know."""

    separator: str = " "
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Wording:
        """A wording in which every word of the language is written by tokens of its own, so that answers can be recalled.

        Raises:
            DataError: the tokenizer has too few words for that.
        """
        words = [word for word in language.vocabulary() if word not in language.SPECIAL_TOKENS]
        kept = [word for word, fits in zip(words, _fit(tokenizer, words), strict=True) if fits]
        lost = [word for word in words if word not in {*kept}]
        found = [*islice(_others(tokenizer, kept), len(lost))] if lost else []
        if len(found) < len(lost):
            raise DataError(
                f"synthetic texts need {len(words)} words that the tokenizer can tell apart, it has "
                f"{len(kept) + len(found)}; give texts of your own with --dataset"
            )
        return cls(_separator(tokenizer, [*kept, *found]), dict(zip(lost, found, strict=True)))

    def write(self, words: Sequence[str]) -> tuple[str, list[range]]:
        """The words as a text, and the characters of each."""
        written = [self.stand_ins.get(word, word) for word in words]
        return self.separator.join(written), _places(written, self.separator)


def _places(words: Sequence[str], separator: str) -> list[range]:
    places, at = [], 0
    for word in words:
        places.append(range(at, at + len(word)))
        at += len(word) + len(separator)
    return places


def _separator(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> str:
    """A space, unless the tokenizer knows the words and not what stands between them."""
    spaced = tokenizer(" ".join(words), add_special_tokens=False, verbose=False)["input_ids"]
    return "" if tokenizer.unk_token_id in spaced else " "


def _fit(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[bool]:
    """For each word, whether its tokens hold all its characters and are not those of a word before it."""
    encoded = tokenizer(list(words), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    seen, fits = set[tuple[int, ...]](), []
    for word, ids, offsets in zip(words, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        held = {at for begin, end in offsets for at in range(begin, end)}
        fits.append(held >= {*range(len(word))} and tokenizer.unk_token_id not in ids and tuple(ids) not in seen)
        seen.add(tuple(ids))
    return fits


def _others(tokenizer: PreTrainedTokenizerBase, kept: Sequence[str]) -> Iterator[str]:
    """Words of the tokenizer's own vocabulary that fit beside the kept ones, in its order."""
    special, known = {*tokenizer.all_special_ids}, [*kept]
    candidates = (str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in special)
    usable = (word for word in dict.fromkeys(candidates) if word.isalnum() and word not in kept)
    while batch := [*islice(usable, BATCH)]:
        fits = _fit(tokenizer, [*known, *batch])[len(known) :]
        found = [word for word, fit in zip(batch, fits, strict=True) if fit]
        known += found
        yield from found
