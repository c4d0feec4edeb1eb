"""Ours beside lm-eval's own RULER: the same random numbers and words give the same texts, answers and scores."""

from __future__ import annotations

import random

import nltk
import numpy as np
import pytest

# its needles look for a download of nltk's when they are imported
with pytest.MonkeyPatch.context() as nothing_to_download:
    nothing_to_download.setattr(nltk.data, "find", lambda name: name)
    from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, niah_utils, prepare_niah, qa_utils, vt_utils

from moa.eval.longtext import common_words, frequent_words, lm_eval_task, niah, questions, variables
from moa.eval.longtext.draft import Draft
from moa.eval.longtext.families import NEEDLES
from moa.eval.longtext.passages import Asked
from moa.eval.longtext.prose import essay_words, split_sentences
from moa.eval.longtext.sized import prompt

SEEDS = range(5)


class Numbers(random.Random):
    """A stream that can stand in for the module `random`."""

    Random = random.Random


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NEEDLES)
def test_needles(name, seed, monkeypatch):
    needles = NEEDLES[name]
    monkeypatch.setattr(prepare_niah, "random", Numbers(seed))
    monkeypatch.setattr(prepare_niah, "cached_sent_tokenize", split_sentences)
    essay = needles.haystack == "essay"
    haystack = essay_words("0-essay", 900) if essay else prepare_niah.get_haystack(needles.haystack)
    units = 700 if essay else 30
    text, answers, query = prepare_niah.generate_input_output(
        units,
        haystack,
        type_haystack=needles.haystack,
        num_needle_k=max(needles.n_keys, needles.n_queries),
        type_needle_k=needles.keys,
        num_needle_v=needles.n_values,
        type_needle_v=needles.values,
        template=niah_utils.TEMPLATE,
        num_needle_q=needles.n_queries,
    )
    hidden = niah.hide(needles, random.Random(seed), units, prepare_niah.WORDS, "0-essay")
    assert niah.question(needles, hidden.context, hidden.query) == text
    assert (list(hidden.answers), hidden.query) == (answers, query)


def test_how_answers_about_needles_begin(monkeypatch, english):
    monkeypatch.setattr(prepare_niah, "random", Numbers(0))
    for name in ("niah_single_1", "niah_multikey_3"):
        needles = NEEDLES[name]
        (row,) = prepare_niah.generate_samples(
            prepare_niah.get_haystack(needles.haystack),
            english,
            max_seq_length=1024,
            type_haystack=needles.haystack,
            type_needle_k=needles.keys,
            type_needle_v=needles.values,
            template=niah_utils.TEMPLATE,
            num_samples=1,
        )
        query = row["input"].split(" for ")[-1].split(" mentioned")[0]
        assert niah.prefix(needles, query) == row["gen_prefix"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n_noises", "example"), [(40, False), (6, False), (5, True)])
def test_variables(n_noises, example, seed, monkeypatch):
    numbers = Numbers(seed)
    monkeypatch.setattr(vt_utils, "random", numbers)
    monkeypatch.setattr(np.random, "randint", lambda low, high: numbers.randint(low, high - 1))
    text, names = vt_utils.generate_input_output(n_noises, num_chains=1, num_hops=4, is_icl=example)
    letters = variables.EXAMPLE_NAME_LETTERS if example else variables.NAME_LETTERS
    context, value, ours = variables.tracked(random.Random(seed), n_noises, letters)
    draft = Draft(variables.ask(context, value), variables.answer_prefix(value, len(ours)), tuple(ours))
    assert (prompt(draft), ours) == (text.rstrip(), names)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n_words", "often", "seldom"), [(20, 3, 1), (60, 30, 3)])
def test_common_words(n_words, often, seldom, seed, monkeypatch):
    monkeypatch.setattr(cwe_utils, "random", random.Random(seed))
    monkeypatch.setattr(cwe_utils, "RNG", random.Random(7))
    theirs = cwe_utils.get_example(n_words, often, seldom)
    assert (
        common_words.numbered(random.Random(seed), random.Random(7), cwe_utils.WORDS, n_words, often, seldom) == theirs
    )
    draft = Draft(common_words.QUESTION.format(context=theirs[0]), common_words.PREFIX, tuple(theirs[1]))
    assert prompt(draft) == cwe_utils.TEMPLATE.format(context=theirs[0], query="")


@pytest.mark.parametrize("seed", SEEDS)
def test_frequent_words(seed, monkeypatch, english):
    monkeypatch.setattr(fwe_utils, "random", Numbers(seed))
    text, answers, _ = fwe_utils.generate_input_output(10**6, english, num_words=400, vocab_size=40)
    vocabulary = frequent_words.coded_words(random.Random(seed), 40)
    context = frequent_words.coded_text(vocabulary, 400)
    draft = Draft(frequent_words.QUESTION.format(context=context), frequent_words.PREFIX, tuple(vocabulary[1:4]))
    assert (prompt(draft), vocabulary[1:4]) == (text, answers)


@pytest.mark.parametrize("seed", SEEDS)
def test_questions(seed, monkeypatch):
    monkeypatch.setattr(qa_utils, "random", Numbers(seed))
    passages = [f"Passage {i} says {i * i}." for i in range(30)]
    asked = Asked("What does passage 4 say?", ("16",), (4, 9))
    qas = [{"query": asked.question, "outputs": ["16"], "context": [4, 9]}]
    text, _ = qa_utils.generate_input_output(0, 12, qas, passages)
    context, _ = questions.documents(random.Random(seed), passages, asked, 12)
    assert questions.QUESTION.format(only=questions.ONLY, context=context, query=asked.question) == text


@pytest.mark.parametrize("answer", ["it is 12 and THREE.", "\x0012\n", "", "three twelve 12"])
@pytest.mark.parametrize("outputs", [["12"], ["12", "three"], ["twelve", "12", "x"]])
def test_scores(answer, outputs):
    doc = {"outputs": outputs, "max_length": 4096}
    theirs = common_utils.process_results(doc, [answer])["4096"]
    assert lm_eval_task.all_found(doc, [answer]) == {"score": theirs, "4096": theirs}
    # lm-eval divides by the number of right answers, RULER itself asks for one of them
    one = max(common_utils.process_results_part({**doc, "outputs": [o]}, [answer])["4096"] for o in outputs)
    assert lm_eval_task.any_found(doc, [answer])["score"] == one
