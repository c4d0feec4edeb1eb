"""The model that ships: it is there, it is small, and it answers."""

from __future__ import annotations

import math

import pytest

from moa import demo
from moa.eval.recall import answer, recall_texts
from moa.eval.records import RecallTask
from moa.hf.load import load_model, load_tokenizer
from moa.pipeline import CompressSettings, check_lengths

MAX_BYTES = 10 << 20


@pytest.fixture(scope="module")
def shipped() -> str:
    if not (demo.MODEL_FOLDER / "config.json").is_file():
        pytest.skip(f"no model at {demo.MODEL_FOLDER} yet; recipes/demo trains it")
    return demo.resolve("demo")


def test_other_names_stay_as_they_are() -> None:
    assert demo.resolve("demo") == str(demo.MODEL_FOLDER)
    for name in ("org/model", "./demo", "demo2", ""):
        assert demo.resolve(name) == name


def test_it_is_small(shipped: str) -> None:
    files = [p for p in demo.MODEL_FOLDER.rglob("*") if p.is_file()]
    assert {"config.json", "tokenizer.json"} <= {p.name for p in files}
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert sum(p.stat().st_size for p in files) <= MAX_BYTES


def test_it_answers(shipped: str) -> None:
    model, tokenizer = load_model(shipped), load_tokenizer(shipped)
    task = RecallTask(texts_per_family=1, single_texts=2)
    answers = [a for text in recall_texts(tokenizer, 512, task) for a in answer(model, text)]
    assert len(answers) > 10
    assert sum(a.right for a in answers) / len(answers) >= 0.9
    assert all(math.isfinite(a.nll) for a in answers)


def test_the_demos_lengths_fit_it(shipped: str) -> None:
    from moa.demo.job import PROFILE_LENGTHS, VALIDATE_LENGTH

    settings = CompressSettings(lengths_tokens=PROFILE_LENGTHS, validate_length_tokens=VALIDATE_LENGTH)
    check_lengths(load_model(shipped), settings)
