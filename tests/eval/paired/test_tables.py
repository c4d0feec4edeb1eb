"""Tables say everything, in few columns, and never claim memory that a way does not save."""

from __future__ import annotations

import itertools

import pytest

from moa.eval.paired import tables
from moa.eval.paired.view import View

SEVEN = ("dense", "moa", "streaming", "duo", "masked", "h2o", "snapkv")
THIRTEEN = tuple(f"task_{i}" for i in range(13))
FIVE = (4096, 8192, 16384, 32768, 65536)


def texts(row):
    return [entry.text for entry in row]


def every_table(view):
    found = [tables.glance(view), tables.kv_bytes(view), tables.depths(view)]
    found += [tables.overview(view, n) for n in view.lengths]
    found += [tables.detail(view, cell) for cell in view.report.cells]
    return [table for table in found if table]


def test_every_row_has_an_entry_for_each_heading(made_up):
    many, few = View(made_up(SEVEN, THIRTEEN, FIVE, samples=5)), View(made_up(("dense", "moa"), lengths=(None,)))
    alone = View(made_up(("dense",), lengths=(1024, None), depths=False))
    for view in (many, few, alone):
        for table in every_table(view):
            assert {len(row) for row in (*table.rows, *table.foot)} == {len(table.headings)}


def test_thirteen_tasks_five_lengths_and_seven_ways_stay_readable(made_up):
    view = View(made_up(SEVEN, THIRTEEN, FIVE, samples=5))
    assert texts(row[0] for row in tables.glance(view).rows) == [*SEVEN]
    for n in FIVE:
        overview = tables.overview(view, n)
        assert overview.headings == ["", "samples", *SEVEN]
        assert [row[0].text for row in overview.rows] == [*THIRTEEN, "perplexity (nll)"]
        assert [row[0].text for row in overview.foot] == ["mean of 13 shares", "KV bytes"]
    details = [tables.detail(view, cell) for cell in view.report.cells]
    assert len(details) == 14 * 5
    assert all([row[0].text for row in table.rows] == [*SEVEN] for table in details)
    anchors = {row[0].anchor for n in FIVE for row in tables.overview(view, n).rows}
    assert anchors == {table.anchor for table in details}
    widest = max(sum(map(len, texts(row))) for table in every_table(view) for row in table.rows)
    assert widest < 130


def test_numbers_are_the_reports(made_up):
    view = View(made_up())
    for difference in view.report.differences:
        cell = (difference.task, difference.length_tokens, difference.metric)
        headings, row = (table := tables.detail(view, cell)).headings, table.rows[1:]
        told = dict(zip(headings, next(r for r in row if r[0].text == difference.variant), strict=True))
        assert told["score"].value == pytest.approx(difference.mean)
        assert told["difference"].value == difference.difference
        assert told["p"].value == difference.p_value
        assert told["won / lost"].text == f"{difference.better} / {difference.worse}"
        low, high = told["difference"].text.split("[")[1].rstrip("]").split(",")
        scale = 100 if difference.metric == "score" else 1
        assert (float(low), float(high)) == pytest.approx((scale * difference.low, scale * difference.high), abs=0.051)


def test_few_ways_have_their_intervals_beside_them(made_up):
    view = View(made_up(("dense", "moa", "other")))
    overview = tables.overview(view, 1024)
    assert overview.headings == ["", "samples", "dense", *(p for n in ("moa", "other") for p in (n, "difference", "p"))]
    mean = view.mean_difference(view.others[0], 1024)
    assert overview.foot[0][4].value == mean.value
    assert "[" in overview.rows[0][4].text


def test_a_way_that_hides_keys_claims_no_memory(made_up):
    view = View(made_up())
    ours, _, masked = view.others
    assert tables.kv_entry(ours, 1024).text == "250.00 KiB (25 %)"
    assert tables.kv_entry(ours, 1024).value == 256_000
    assert tables.kv_entry(masked, 1024).text == "1000.00 KiB (sees 25 %)"
    assert tables.kv_entry(masked, 1024).value == tables.kv_entry(view.dense, 1024).value == 1_024_000
    assert tables.MASKED in tables.notes(view)
    assert tables.MASKED not in tables.notes(View(made_up(("dense", "moa"))))
    for table in every_table(view):
        for row in itertools.chain(table.rows, table.foot):
            if "masked" in texts(row)[:2]:
                assert "250.00 KiB" not in " ".join(texts(row))


def test_what_was_not_measured_is_said(made_up):
    report = made_up()
    lacking = report.model_copy(
        update={
            "scores": tuple(s for s in report.scores if (s.variant, s.task) != ("moa", "vt")),
            "variants": tuple(v.model_copy(update={"kv": ()}) if v.name == "moa" else v for v in report.variants),
        }
    )
    view = View(lacking)
    table = tables.detail(view, ("vt", 1024, "score"))
    assert texts(table.rows[1]) == ["moa", *["–"] * 6]
    assert tables.glance(view).rows[1][1].text == "–"
    assert tables.kv_bytes(view).rows[1][1].text == "–"


def test_texts_of_any_length_have_no_bytes_and_losses_no_glance(made_up):
    view = View(made_up(lengths=(None,), tasks=("kv",), depths=False))
    assert tables.kv_bytes(view) is None
    assert tables.depths(view) is None
    assert "KV bytes" not in tables.detail(view, view.report.cells[0]).headings
    assert tables.overview(view, None).title == "texts of any length"
    only_losses = made_up(tasks=("kv",)).model_copy(
        update={"scores": tuple(s for s in made_up(tasks=("kv",)).scores if s.metric == "nll")}
    )
    assert tables.glance(View(only_losses)) is None
