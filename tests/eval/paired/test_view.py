"""Means, differences and shares by depth of a report are those of its samples."""

from __future__ import annotations

import numpy as np
import pytest

from moa.eval.paired.view import DEPTH_BUCKETS, View


def test_a_mean_weighs_tasks_alike(made_up):
    view = View(made_up())
    for variant in view.report.variants:
        for n in view.lengths:
            of_tasks = [np.mean([s.score for s in view.scores(variant, cell).samples]) for cell in view.shares(n)]
            mean = view.mean(variant, n)
            assert mean.value == pytest.approx(np.mean(of_tasks))
            assert mean.shares == len(of_tasks) == 3  # the loss is none
            assert mean.low <= mean.value <= mean.high
            difference = view.mean_difference(variant, n)
            if variant is view.dense:
                assert difference is None
            else:
                assert difference.value == pytest.approx(mean.value - view.mean(view.dense, n).value)


def test_a_variant_that_lacks_a_task_has_no_mean(made_up):
    report = made_up()
    lacking = report.model_copy(
        update={
            "scores": tuple(s for s in report.scores if (s.variant, s.task, s.length_tokens) != ("moa", "vt", 1024))
        }
    )
    view = View(lacking)
    ours = view.others[0]
    assert view.mean(ours, 1024) is None
    assert view.mean_difference(ours, 1024) is None
    assert view.mean(ours, 4096) is not None


def test_shares_by_depth_are_of_all_samples_there(made_up):
    view = View(made_up(samples=23))
    ours = view.others[1]
    found = view.by_depth(ours, view.with_depth)
    samples = [sample for cell in view.with_depth for sample in view.scores(ours, cell).samples]
    for i, at in enumerate(found):
        there = [s.score for s in samples if i <= s.depth_ratio * DEPTH_BUCKETS < i + 1]
        assert at == (pytest.approx(np.mean(there)), len(there))
    assert sum(at[1] for at in found) == len(samples) == 23 * 3 * 2


def test_the_end_of_a_text_is_in_its_last_part(made_up):
    report = made_up(tasks=("kv",), lengths=(1024,))
    ends = [s.model_copy(update={"samples": tuple(e.model_copy(update={"depth_ratio": 1.0}) for e in s.samples)}) for s in report.scores]  # fmt: skip
    view = View(report.model_copy(update={"scores": tuple(ends)}))
    assert view.by_depth(view.dense, view.with_depth)[:-1] == [None] * (DEPTH_BUCKETS - 1)
    assert view.by_depth(view.dense, view.with_depth)[-1][1] == 20


def test_more_loss_is_worse_and_fewer_right_answers_are(made_up):
    view = View(made_up(samples=200))
    worst = view.others[-1]
    for cell in view.cells(4096):
        assert view.tone(view.difference(worst, cell)) == "worse"
    assert view.mean_difference(worst, 4096).tone == "worse"
    assert view.loss_difference(worst, 4096, "nll").value > 0
    # the other way round
    dense = view.dense
    names = {dense.name: worst.name, worst.name: dense.name}
    swapped = [s.model_copy(update={"variant": names.get(s.variant, s.variant)}) for s in view.report.scores]
    view = View(view.report.model_copy(update={"scores": tuple(swapped)}))
    assert {view.tone(view.difference(worst, cell)) for cell in view.cells(4096)} == {"better"}


def test_an_interval_around_nothing_says_nothing(made_up):
    report = made_up(variants=("dense", "same"))
    same = [s.model_copy(update={"variant": "same"}) for s in report.scores if s.variant == "dense"]
    view = View(report.model_copy(update={"scores": (*(s for s in report.scores if s.variant == "dense"), *same)}))
    assert {view.tone(view.difference(view.others[0], cell)) for cell in report.cells} == {""}


def test_lengths_ascend_and_texts_of_any_length_come_last(made_up):
    assert View(made_up(lengths=(4096, None, 1024))).lengths == (1024, 4096, None)
