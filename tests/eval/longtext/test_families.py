"""Every family: documents fit, hold their answers, and are the same ones each time."""

from __future__ import annotations

import json
import re

import pytest

from moa.demo.tokenizer import build_tokenizer
from moa.errors import DataError, UsageError
from moa.eval.longtext import common_words
from moa.eval.longtext.families import FAMILIES, family
from moa.eval.longtext.sized import tokens
from moa.eval.recall import recall_texts
from moa.eval.records import RecallTask

WRITTEN = [name for name, found in FAMILIES.items() if found.answer_tokens]
DEMO = [name for name in FAMILIES if name.startswith("demo_")]
LENGTH = 1600


def make(name, tokenizer, length=LENGTH, count=4, seed=0, **options):
    return family(name).make(tokenizer, length, count, seed, options)


@pytest.mark.parametrize("name", WRITTEN)
def test_prompt_and_answer_fill_the_length_and_no_more(name, english):
    for doc in make(name, english):
        used = tokens(english, f"{doc['input']} {doc['gen_prefix']}") + family(name).answer_tokens
        assert used == doc["length"] <= LENGTH == doc["max_length"]
        assert used > LENGTH * 0.85  # a unit more would be too much


@pytest.mark.parametrize("name", WRITTEN)
def test_the_answer_stands_in_the_text_and_fits_the_room(name, english):
    for doc in make(name, english):
        assert doc["outputs"]
        assert all(answer in doc["input"] for answer in doc["outputs"])
        assert tokens(english, doc["outputs"][0]) <= family(name).answer_tokens


@pytest.mark.parametrize("name", [*WRITTEN, "perplexity"])
def test_a_sample_depends_on_seed_and_index_alone(name, english):
    docs = make(name, english)
    assert docs == make(name, english)
    assert docs[:3] == make(name, english, count=3)
    assert len({json.dumps(doc) for doc in docs}) == len(docs)
    assert docs[0] != make(name, english, seed=1)[0]


@pytest.mark.parametrize("name", ["passkey", "kv"])
def test_evidence_goes_from_start_to_end(name, english):
    depths = []
    for doc in make(name, english, count=10):
        context = doc["input"].split("\n", 1)[1]
        depths.append(context.index(doc["outputs"][0]) / len(context))
        assert depths[-1] == pytest.approx(doc["depth_ratio"], abs=0.15)
    assert depths == sorted(depths)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_3", "qa_1", "qa_2", "vt"])
def test_depth_is_where_the_evidence_begins(name, english):
    for doc in make(name, english):
        assert 0 <= doc["depth_ratio"] < 1


def test_the_common_words_are_the_most_common_ones(english):
    (doc,) = make("cwe", english, count=1)
    listed = doc["input"].rsplit(common_words.QUESTION.split("{")[0], 1)[1].split("\nQuestion")[0].split()[1::2]
    counts = {word: listed.count(word) for word in listed}
    assert {*sorted(counts, key=counts.get, reverse=True)[:10]} == {*doc["outputs"]}
    assert min(counts[word] for word in doc["outputs"]) > max(n for w, n in counts.items() if w not in doc["outputs"])


def test_the_frequent_words_are_the_most_frequent_ones(english):
    (doc,) = make("fwe", english, count=1)
    coded = doc["input"].split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = {word: coded.count(word) for word in coded if word != "..."}
    assert sorted(counts, key=counts.get, reverse=True)[:3] == doc["outputs"]


@pytest.mark.parametrize(("name", "passages"), [("qa_1", 1), ("qa_2", 2)])
def test_questions_have_one_answer(name, passages, english):
    for doc in make(name, english, count=8):
        documents = doc["input"].split("\n\nDocument ")
        assert len(documents) > 4
        (answer,) = doc["outputs"]
        name_asked = re.search(r"[A-Z]\w+ [A-Z]\w+(?= (was )?born)", doc["input"].rsplit("Question: ", 1)[1])[0]
        life = next(text for text in documents if f"{name_asked} was born in" in text)
        town = life.split("was born in ")[1].split(" in ")[0]
        assert answer == town if passages == 1 else f"{town} is a town in {answer}" in doc["input"]


def test_passages_may_be_supplied(tmp_path, english):
    path = tmp_path / "passages.jsonl"
    rows = [
        {"passage": f"Number {i} is {i * 37}. " * 3, "question": f"What is number {i}?", "answers": [str(i * 37)]}
        for i in range(9, 40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"passage": "This one only distracts."}]))
    docs = make("qa_1", english, length=900, passages_file=str(path))
    assert [doc["outputs"] for doc in docs] == [["333"], ["370"], ["407"], ["444"]]
    assert all("Document 2" in doc["input"] for doc in docs)


@pytest.mark.parametrize(
    "row", ['{"passage": 1}', "[]", "{", '{"passage": "a", "question": "b"}', '{"question": "b", "answers": ["c"]}']
)
def test_passages_of_another_form_are_refused(row, tmp_path, english):
    path = tmp_path / "passages.jsonl"
    path.write_text(row)
    with pytest.raises(DataError, match=r"passages.jsonl"):
        make("qa_1", english, passages_file=str(path))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DEMO])
def test_a_tokenizer_without_english_is_refused(name):
    with pytest.raises(DataError, match="moa_demo_"):
        make(name, build_tokenizer())


@pytest.mark.parametrize("name", FAMILIES)
def test_too_short_a_length_is_refused(name, english):
    with pytest.raises(DataError, match="lengths"):
        make(name, build_tokenizer() if name in DEMO else english, length=7)


def test_an_unknown_family_is_refused():
    with pytest.raises(UsageError, match="did you mean 'passkey'"):
        family("pasky")


@pytest.mark.parametrize("name", ["perplexity", "demo_perplexity"])
def test_the_scored_part_is_the_end_of_the_text(name, english):
    tokenizer = build_tokenizer() if name in DEMO else english
    for doc in make(name, tokenizer):
        whole = tokenizer(doc["input"] + doc["target"])["input_ids"]
        assert LENGTH * 0.95 < len(whole) == doc["length"] <= LENGTH
        assert whole[: -doc["tokens"]] == tokenizer(doc["input"])["input_ids"]
        assert LENGTH * 0.4 < doc["tokens"] <= LENGTH / 2


def test_a_text_may_be_supplied(tmp_path, english):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"This is sentence number {i} of the text." for i in range(400)))
    docs = make("perplexity", english, length=600, count=2, text_file=str(path))
    assert [doc["input"][:27] for doc in docs] == ["This is sentence number 0 o", "This is sentence number 200"]
    with pytest.raises(DataError, match="text_file"):
        make("perplexity", english, length=60_000, text_file=str(path))


def test_the_demos_questions_are_those_of_its_own_evaluation():
    tokenizer = build_tokenizer()
    for name in ("single", "multikey", "multivalue", "chain"):
        docs = make(f"demo_{name}", tokenizer, length=512, count=9)
        texts = recall_texts(tokenizer, 512, RecallTask(families=(name,), seed=0, texts_per_family=9, single_texts=9))
        asked = [(text, question) for text in texts for question in text.questions][:9]
        for doc, (text, question) in zip(docs, asked, strict=True):
            whole = tuple(tokenizer(doc["input"] + doc["target"])["input_ids"])
            start = question.positions[0]
            assert whole == text.token_ids[: question.positions[-1] + 1]
            assert tuple(tokenizer(doc["input"])["input_ids"]) == text.token_ids[:start]
            assert doc["depth_ratio"] == question.depth_ratio
