"""What names a place on this machine is found, and said without it; what does not is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa.local_paths import looks_local, places_in, public_command, public_name

PLACES = [
    "/home/me/models/llama-8B",
    "/home/me",
    "~/models/llama",
    "~me/models/llama",
    "./out",
    "../out/plan.json",
    "C:\\Users\\me\\model",
    "d:/models/x",
    "file:///home/me/x.jsonl",
]
OTHERS = [
    "org/name",
    "org/name:config/split",
    "synthetic",
    "https://example.org/a/b",
    "hf://datasets/org/name",
    "1/4",
    "tokens/s",
    "and/or",
    "a... b",
    "</b>",
    "alpha + beta * n",
    "12 / 3",
    "2026-07-01T10:00:00+00:00",
    "spans-4096.png",
    "~5 %",
    "",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "around", ["{}", "moa eval {} --plan x", '"{}"', "`{}`", "--dataset={}", "({})", "a,{},b", "| {} |"]
)
def test_places_are_found_in_texts(place, around) -> None:
    assert list(places_in(around.format(place))) == [place]
    assert looks_local(place)


@pytest.mark.parametrize("text", OTHERS)
def test_other_texts_name_no_place(text) -> None:
    assert list(places_in(text)) == []
    assert not looks_local(text)
    assert public_name(text) == text


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("/home/me/models/llama-8B", "llama-8B"),
        ("/home/me/models/llama-8B/", "llama-8B"),
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("/home/me/rows:chat/train", "rows:chat/train"),
        ("C:\\Users\\me\\model", "model"),
        ("C:\\Users\\me\\rows:chat", "rows:chat"),
        ("../rows.jsonl", "rows.jsonl"),
    ],
)
def test_of_a_place_its_last_part_is_told(name, want) -> None:
    assert public_name(name) == want
    assert list(places_in(public_name(name))) == []


def test_what_lies_here_is_a_place_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "rows:1.jsonl").write_text("")
    assert public_name("org/name") == "name"
    assert public_name("org/name:chat/train") == "name:chat/train"
    assert public_name("rows:1.jsonl") == "rows:1.jsonl"
    assert public_name(".") == tmp_path.name
    assert public_name("x" * 5000) == "x" * 5000


def test_a_command_is_told_without_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/secret").mkdir(parents=True)
    typed = ["moa", "compress", "models/secret", "-o", "/home/me/out", "--dataset=/home/me/a.jsonl", "--density", "0.5"]
    assert public_command(typed) == ["moa", "compress", "secret", "-o", "out", "--dataset=a.jsonl", "--density", "0.5"]
    assert public_command(["moa", "push", "org/name", "-"]) == ["moa", "push", "org/name", "-"]


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("Llama-3-8B=/home/me/plan.json", "Llama-3-8B=plan.json"),
        ("--plan=Llama-3-8B=/home/me/plan.json", "--plan=Llama-3-8B=plan.json"),
        ("/home/me/rank=8/plan.json", "plan.json"),
        ("--output-dir=/home/me/rank=8/out", "--output-dir=out"),
        ("rank=8", "rank=8"),
    ],
)
def test_a_word_that_names_a_place_within_is_told_without_it(word: str, want: str) -> None:
    assert public_command([word]) == [want]
