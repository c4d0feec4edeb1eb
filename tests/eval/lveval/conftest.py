"""Files as LV-Eval publishes them, a few samples in each."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SAMPLES = [
    {"input": "Where does Anna live?", "context": "Anna lives in Paris. {Bert} lives in Rome.", "answers": ["Paris"]},
    {"input": "Who is old?", "context": "The cart is old, and so is Bert.", "answers": ["the cart", "Bert"]},
]
REST = {"length": 9, "dataset": "x", "language": "en", "confusing_facts": "", "answer_keywords": "Paris"}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Path]:
    """`publish(subset, level, rows)` writes SUBSET.zip with SUBSET/SUBSET_LEVEL.jsonl into a folder, which it returns."""

    def write(subset: str, level: str = "16k", rows: list[dict[str, Any]] | None = None) -> Path:
        folder = tmp_path / "published"
        folder.mkdir(exist_ok=True)
        rows = [{**REST, **row} for row in SAMPLES] if rows is None else rows
        with zipfile.ZipFile(folder / f"{subset}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{subset}/{subset}_{level}.jsonl", lines(rows))
            archive.writestr(f"__MACOSX/{subset}/._{subset}_{level}.jsonl", b"\0")
        return folder

    return write
