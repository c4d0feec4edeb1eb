"""Counting is proved on oracles whose right and wrong answers are known beforehand."""

from __future__ import annotations

import math

import pytest

from moa.demo import language
from moa.errors import DataError
from moa.eval.recall import answer, generate_matches, recall, recall_texts
from moa.eval.records import RecallTask
from moa.hf import apply
from moa.profile.synthetic import synthetic_samples

SMALL = RecallTask(single_texts=3, questions_per_text=6)


def test_an_oracle_gets_everything_right(oracle, tokenizer):
    (at,) = recall(oracle(), tokenizer, (512,), SMALL)
    assert at.overall.questions == 3 + 3 * 2 * 6
    assert at.overall.right == at.overall.questions
    assert at.overall.accuracy_ratio == at.overall.high_ratio == 1
    # logits 10 for the right token, 0 for all others
    assert at.overall.answer_nll == pytest.approx(math.log1p((len(tokenizer) - 1) * math.exp(-10)), rel=1e-4)


def test_a_model_that_knows_nothing_gets_nothing_right(oracle, tokenizer):
    (at,) = recall(oracle(lambda position, n: True), tokenizer, (512,), SMALL)
    assert at.overall.right == 0
    assert at.overall.low_ratio == 0 < at.overall.high_ratio
    assert at.overall.answer_nll > 9


def test_families_and_depths_add_up_to_the_whole(oracle, tokenizer):
    (at,) = recall(oracle(lambda position, n: position % 2 == 0), tokenizer, (512,), SMALL)
    assert 0 < at.overall.right < at.overall.questions
    assert [f.family for f in at.families] == list(language.FAMILIES)
    for parts in (at.families, at.depths):
        for field in ("questions", "right", "answer_tokens"):
            assert sum(getattr(part.score, field) for part in parts) == getattr(at.overall, field)
    nll = sum(f.score.answer_nll * f.score.answer_tokens for f in at.families)
    assert nll == pytest.approx(at.overall.answer_nll * at.overall.answer_tokens)


def test_one_wrong_token_spoils_an_answer_of_several(oracle, tokenizer):
    task = RecallTask(families=("multivalue",), questions_per_text=8)
    text = recall_texts(tokenizer, 512, task)[0]
    spoiled = text.questions[3]
    assert len(spoiled.positions) > 1
    answers = answer(oracle(lambda position, n: position == spoiled.positions[-1]), text)
    assert [a.right for a in answers] == [q is not spoiled for q in text.questions]


def test_facts_beyond_a_window_are_missed_and_counted_by_depth(oracle, tokenizer):
    texts = recall_texts(tokenizer, 1024, SMALL)
    far = {p for text in texts for q in text.questions if q.depth_ratio < 0.4 for p in q.positions}
    near = {p for text in texts for q in text.questions if q.depth_ratio >= 0.4 for p in q.positions}
    blind = far - near  # the oracle knows positions, not texts
    (at,) = recall(oracle(lambda position, n: position in blind), tokenizer, (1024,), SMALL)
    for depth in at.depths:
        if depth.from_ratio >= 0.4:
            assert depth.score.accuracy_ratio == 1
    assert any(depth.score.accuracy_ratio < 1 for depth in at.depths if depth.to_ratio <= 0.4)


def test_the_answers_are_the_stated_facts(tokenizer):
    for text in recall_texts(tokenizer, 512, SMALL):
        words = tokenizer.convert_ids_to_tokens(list(text.token_ids))
        assert len(words) == 512
        for question in text.questions:
            key = words[question.positions[0] - 2]
            values = [words[p] for p in question.positions]
            assert key in language.KEYS
            assert set(values) <= set(language.VALUES)
            stated = " ".join(words[: text.questions[0].positions[0] - 7])
            assert f"{' '.join(values)} ." in stated


def test_depth_says_where_the_fact_lies(tokenizer):
    task = RecallTask(families=("single",), single_texts=5)
    for text in recall_texts(tokenizer, 1024, task):
        (question,) = text.questions
        words = tokenizer.convert_ids_to_tokens(list(text.token_ids))
        fact = round(question.depth_ratio * 1024)
        assert words[fact : fact + 3] == ["the", "code", "of"]
        assert words[fact + 3] == words[question.positions[0] - 2]


def test_the_default_costs_twelve_forward_calls_per_length(oracle, tokenizer):
    model, task = oracle(), RecallTask()
    recall(model, tokenizer, (1024,), task)
    assert model.calls == task.forwards_per_length == 12


def test_same_task_same_result_and_other_seeds_other_texts(model, tokenizer):
    task = RecallTask(single_texts=1, texts_per_family=1)
    assert recall(model, tokenizer, (256,), task) == recall(model, tokenizer, (256,), task)
    assert not set(recall_texts(tokenizer, 256, RecallTask(seed=1))) & set(recall_texts(tokenizer, 256, RecallTask()))


def test_leaving_out_a_family_leaves_the_others_alone(tokenizer):
    everything = recall_texts(tokenizer, 512, SMALL)
    some = recall_texts(tokenizer, 512, SMALL.model_copy(update={"families": ("multivalue",)}))
    assert some == tuple(t for t in everything if t.questions[0].family == "multivalue")


def test_no_text_is_a_calibration_text(tokenizer):
    calibration = {s.token_ids for s in synthetic_samples(tokenizer, 512, 16, seed=0)}
    assert not calibration & {t.token_ids for t in recall_texts(tokenizer, 512, RecallTask())}


def test_packed_answers_equal_greedy_generation_dense_and_under_a_plan(model, tokenizer, plan):
    task = RecallTask(single_texts=1, texts_per_family=1)
    assert generate_matches(model, tokenizer, 256, prompts=4, task=task).agreeing == 4
    dense = recall(model, tokenizer, (256,), task)
    with apply(model, plan):
        assert generate_matches(model, tokenizer, 256, prompts=4, task=task).agreeing == 4
        assert recall(model, tokenizer, (256,), task) != dense
    assert recall(model, tokenizer, (256,), task) == dense


def test_a_length_without_room_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="20 tokens are too short"):
        recall(model, tokenizer, (20,))
    with pytest.raises(DataError, match="5 prompts need as many texts"):
        generate_matches(model, tokenizer, 256, prompts=5, task=RecallTask(families=("multikey",)))
