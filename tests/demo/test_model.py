"""The model that ships: it is there, it is small, and it answers."""

from __future__ import annotations

import math

import pytest
import torch

from moa import demo
from moa.demo.language import ONE_HOP
from moa.eval.recall import answer, recall_texts
from moa.eval.records import RecallTask
from moa.hf.apply import apply
from moa.hf.load import load_model, load_tokenizer
from moa.pipeline import check_lengths
from moa.plan import load_plan
from moa.settings import CompressSettings

MAX_BYTES = 10 << 20


@pytest.fixture(scope="module")
def shipped() -> str:
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
    task = RecallTask(families=ONE_HOP, texts_per_family=1, single_texts=2)
    answers = [a for text in recall_texts(tokenizer, 512, task) for a in answer(model, text)]
    assert len(answers) > 10
    assert sum(a.right for a in answers) / len(answers) >= 0.9
    assert all(math.isfinite(a.nll) for a in answers)


def test_the_demos_lengths_fit_it(shipped: str) -> None:
    from moa.demo.job import PROFILE_LENGTHS, VALIDATE_LENGTH

    settings = CompressSettings(lengths_tokens=PROFILE_LENGTHS, validate_length_tokens=VALIDATE_LENGTH)
    check_lengths(load_model(shipped), settings)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000])
def test_its_plan_gives_the_masked_references_logits(shipped: str, n_tokens: int, dtype: str) -> None:
    """Around every edge: sinks (8), least span (16), block of the torch backend (64 to 256); whole and in chunks.

    In float32 the bound is 1e-5 of the largest logit (21): dense sdpa and eager differ by 2e-5 on this model themselves.
    """
    model, tokenizer = load_model(shipped, dtype), load_tokenizer(shipped)
    (text, *_) = recall_texts(tokenizer, 1024, RecallTask(families=("multikey",), texts_per_family=1))
    tokens = torch.tensor([text.token_ids[:n_tokens]])
    plan = load_plan(shipped)
    with torch.no_grad():
        with apply(model, plan, backend="reference", allow_other_weights=True):
            want = model(tokens, use_cache=False).logits
        bound = 1e-9 if dtype == "float64" else 1e-5 * float(want.abs().max())
        with apply(model, plan, allow_other_weights=True) as attached:
            torch.testing.assert_close(model(tokens, use_cache=False).logits, want, atol=bound, rtol=0)
            for chunk in (1, 63, 256) if n_tokens < 300 else (250,):
                cache = attached.new_cache()
                parts = [model(part, past_key_values=cache).logits for part in tokens.split(chunk, 1)]
                torch.testing.assert_close(torch.cat(parts, 1), want, atol=bound, rtol=0)


def test_its_plan_really_frees_memory(shipped: str) -> None:
    model, plan = load_model(shipped), load_plan(shipped)
    tokens = torch.randint(10, 300, (1, 3000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), apply(model, plan) as attached:
        model(tokens, past_key_values=attached.new_cache(), logits_to_keep=1)
        assert attached.kv_bytes == pytest.approx(plan.kv_bytes(3000), rel=0.02)
