"""Documents are made once for a tokenizer, a length and a seed."""

from __future__ import annotations

import pytest

from moa.demo.tokenizer import build_tokenizer
from moa.eval.longtext.draft import Family
from moa.eval.longtext.kept import cache_folder, documents, tokenizer_digest


@pytest.fixture
def counted():
    calls = []

    def make(tokenizer, length_tokens, count, seed, options):
        calls.append((length_tokens, count, seed))
        return [{"index": i, "input": f"{length_tokens} {seed} ä"} for i in range(count)]

    return Family("counted", 1, make, 0), calls


def test_made_once(counted, english, cache):
    family, calls = counted
    first = documents(family, english, 512, 3, 0, {})
    assert documents(family, english, 512, 3, 0, {}) == first
    assert len(calls) == 1
    assert len([*(cache / "moa" / "longtext").iterdir()]) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"length_tokens": 513},
        {"count": 4},
        {"seed": 1},
        {"options": {"text_file": "other"}},
        {"tokenizer": build_tokenizer()},
        {"version": 2},
    ],
    ids=lambda other: next(iter(other)),
)
def test_made_anew_for_anything_else(other, counted, english):
    family, calls = counted
    given = {"tokenizer": english, "length_tokens": 512, "count": 3, "seed": 0, "options": {}}
    documents(family, **given)
    changed = Family("counted", other.pop("version"), family.make, 0) if "version" in other else family
    documents(changed, **{**given, **other})
    assert len(calls) == 2


def test_a_changed_file_is_another_option(counted, english, tmp_path):
    family, calls = counted
    path = tmp_path / "text.txt"
    for text in ("one", "one", "two"):
        path.write_text(text)
        documents(family, english, 512, 1, 0, {"text_file": str(path)})
    assert len(calls) == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data.replace(b"512 0", b"999 9"), lambda data: b"[]"]
)
def test_a_damaged_file_is_made_anew(damage, counted, english, cache):
    family, calls = counted
    first = documents(family, english, 512, 3, 0, {})
    (path,) = (cache / "moa" / "longtext").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert documents(family, english, 512, 3, 0, {}) == first
    assert len(calls) == 2


def test_the_digest_tells_what_is_added_around_a_text(english, english_folder):
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(english_folder)
    assert tokenizer_digest(again) == tokenizer_digest(english)
    assert tokenizer_digest(build_tokenizer()) != tokenizer_digest(english)


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore such a one
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "moa" / "longtext"
