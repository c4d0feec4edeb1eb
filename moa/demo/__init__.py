"""The small model that ships with moa: `demo.resolve("demo")` is its folder."""

from __future__ import annotations

from pathlib import Path

NAME = "demo"
MODEL_FOLDER = Path(__file__).parent / "model"


def resolve(name: str) -> str:
    """The model's folder for `demo`, any other name as it is."""
    return str(MODEL_FOLDER) if name == NAME else name
