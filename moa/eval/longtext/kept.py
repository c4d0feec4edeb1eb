"""Generated documents, kept in the user's cache folder, so that they are made once for a tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moa.eval.longtext.draft import Document, Family
from moa.files import write_atomic

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where documents are kept: `$XDG_CACHE_HOME/moa/longtext`, below `~/.cache` where that is not set."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "moa" / "longtext"


def documents(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    length_tokens: int,
    count: int,
    seed: int,
    options: Mapping[str, Any],
) -> list[Document]:
    """A family's documents, read where they have been made before, else made and kept.

    Raises:
        DataError: as the family's `make`.
        ResourceError: the disk is full.
    """
    key = {
        "family": family.name,
        "version": family.version,
        "length_tokens": length_tokens,
        "count": count,
        "seed": seed,
        "tokenizer": tokenizer_digest(tokenizer),
        "options": {name: _option(value) for name, value in sorted(options.items())},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"{family.name}-{length_tokens}-{digest[:32]}.json"
    found = _read(path, key)
    if found is None:
        log.info("making %d documents of %s at %d tokens", count, family.name, length_tokens)
        found = family.make(tokenizer, length_tokens, count, seed, options)
        write_atomic(path, json.dumps({"key": key, "sha256": _digest(found), "documents": found}).encode())
    return found


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides how a tokenizer splits a text."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    probe = tokenizer("a", verbose=False)["input_ids"]  # what is added around a text
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, state, list(probe)]).encode()).hexdigest()


def _option(value: Any) -> Any:
    """An option's value; of a file, its content's digest."""
    if isinstance(value, str) and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _digest(found: list[Document]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: Mapping[str, Any]) -> list[Document] | None:
    """What was kept; None where there is nothing, or something else or damaged, which is then made anew."""
    try:
        content = json.loads(path.read_bytes())
        found: list[Document] = content["documents"]
        if content["key"] == key and content["sha256"] == _digest(found):
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s)", path, error)
        return None
    log.warning("%s is damaged, its documents are made anew", path)
    return None
