"""How long a text of so many tokens can be, for tokenizers that leave nothing of a text out."""

from __future__ import annotations

import json
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# Characters that a normaliser to composed Unicode can make one of (a Greek letter with three marks).
MOST_COMPOSED = 4
LOSSLESS_SPLITS = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")
LOSSLESS_NORMALIZERS = {"NFC": MOST_COMPOSED, "NFKC": MOST_COMPOSED, "NFD": 1, "NFKD": 1, "Prepend": 1, "ByteLevel": 1}


def most_token_chars(backend: Any) -> int | None:
    """Characters of a text that one token stands for at most; None where that cannot be said.

    A tokenizer that knows whole words alone may write a book as one unknown word, and one that drops blanks as nothing.
    Those with byte-level or byte-fallback vocabularies that cut texts and drop nothing have a bound: their longest token.
    """
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # it takes all the blanks beside it
    normalizer, splits = _parts(backend.normalizer, "normalizers"), _parts(backend.pre_tokenizer, "pretokenizers")
    shrinks = [_shrinks(part) for part in normalizer]
    if type(backend.model).__name__ != "BPE" or None in shrinks or not all(_is_lossless(part) for part in splits):
        return None
    is_byte_level = any(part["type"] == "ByteLevel" for part in (*normalizer, *splits))
    wanted = ByteLevel.alphabet() if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = backend.get_vocab(with_added_tokens=True)
    if not (is_byte_level or backend.model.byte_fallback) or not vocab.keys() >= set(wanted):
        return None
    return max(map(len, vocab)) * max([1, *(each for each in shrinks if each is not None)])


def _parts(part: Any, name: str) -> list[dict[str, Any]]:
    """What a normaliser or a splitter consists of."""
    if part is None:
        return []
    told: dict[str, Any] = json.loads(part.__getstate__())
    parts: list[dict[str, Any]] = told.get(name, [told])
    return parts


def _shrinks(normalizer: dict[str, Any]) -> int | None:
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern is not None and len(pattern) <= len(normalizer["content"]) else None
    return LOSSLESS_NORMALIZERS.get(normalizer["type"])


def _is_lossless(split: dict[str, Any]) -> bool:
    return split["type"] in LOSSLESS_SPLITS and split.get("behavior") != "Removed"
