"""The benchmark of the effective context length: equal spans, one search inside the other, and what the page concludes."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.cli.app import run
from moa.eval import bench_context
from moa.eval.bench_context import (
    CARRIED,
    EFFECTIVE,
    FIXED,
    PLAN,
    REPLANNED,
    SEARCH,
    SEARCHES,
    SHARE,
    UNIFORM,
    ContextBench,
    plan_for_span,
)
from moa.eval.context_report import of, page, with_dense, write_report
from moa.eval.effective_context import ContextRow, effective_context, over_seeds
from moa.eval.records import DENSE, wilson
from moa.plan import Plan
from moa.stages import Workspace

SMALL = ContextBench(
    spans_tokens=(64, 128), lengths_tokens=(64, 128, 256), profile_lengths=(128, 256), search_lengths=(256,),
    densities=(0.125, 0.5), short_lengths=(128,), carried_lengths=(128, 512), carried_densities=(0.25,), seeds=(0, 1),
    num_samples=2, questions=4,
)  # fmt: skip


def at(folder, **flags):
    return Workspace.open(folder, **{"resume": False, "overwrite": False, **flags})


@pytest.fixture(scope="module")
def measured(model, tokenizer, tmp_path_factory):
    """All rows, and the plans that were made, by the start of their digests."""
    plans: dict[str, Plan] = {}
    keep = bench_context._Bench.row

    def spy(bench, experiment, method, n_tokens, plan, *rest, **named):
        found = keep(bench, experiment, method, n_tokens, plan, *rest, **named)
        if plan is not None:
            plans[found.plan] = plan
        return found

    folder = tmp_path_factory.mktemp("context")
    with pytest.MonkeyPatch.context() as patch, at(folder) as workspace:
        patch.setattr(bench_context._Bench, "row", spy)
        rows = bench_context.bench_context(model, tokenizer, "tiny", SMALL, workspace)
    return rows, plans, folder


def test_spans_are_equal_where_they_are_compared(measured) -> None:
    rows, _, _ = measured
    for row in (row for row in rows if row.experiment == EFFECTIVE and row.method != DENSE):
        assert row.length_tokens > row.budget
        assert row.mean_span_tokens <= row.budget
        assert row.method == PLAN or row.mean_span_tokens == row.budget
    for row in (row for row in rows if row.experiment == SEARCH and row.method != DENSE):
        assert row.mean_span_tokens <= row.budget * row.length_tokens
    for made_anew in of(rows, CARRIED, REPLANNED):
        (elastic,) = [
            r for r in of(rows, CARRIED, "elastic", None, made_anew.length_tokens) if r.seed == made_anew.seed
        ]
        assert made_anew.mean_span_tokens <= elastic.mean_span_tokens + 1e-9


def test_every_search_is_kept_to(measured) -> None:
    rows, plans, _ = measured
    for method, search in SEARCHES.items():
        found = [plans[row.plan] for row in of(rows, SEARCH, method)]
        assert len(found) == len(SMALL.densities) * len(SMALL.seeds)
        for plan in found:
            assert search.elastic or all(beta == 0 for layer in plan.rules for _, beta in layer)
            assert not search.per_layer or all(len(set(layer)) == 1 for layer in plan.rules)
            assert (plan.objective.elastic, plan.objective.per_layer) == (search.elastic, search.per_layer)
    for row in (*of(rows, CARRIED, FIXED), *of(rows, CARRIED, REPLANNED)):
        assert all(beta == 0 for layer in plans[row.plan].rules for _, beta in layer)
    growing = [{beta for layer in plans[row.plan].rules for _, beta in layer} for row in of(rows, CARRIED, SHARE)]
    assert all(len(betas) == 1 and betas != {0} for betas in growing)


def test_every_cell_is_there_and_in_the_files(measured, tmp_path) -> None:
    rows, _, _ = measured
    for length in SMALL.carried_lengths:
        for method, count in ((DENSE, 1), (SHARE, 1), (FIXED, 2), ("elastic", 2), (REPLANNED, 2)):
            assert len(of(rows, CARRIED, method, None, length)) == count
    assert {row.length_tokens for row in of(rows, EFFECTIVE, UNIFORM, 64)} == {68, 72, 80, 128, 256}
    assert {row.length_tokens for row in of(rows, EFFECTIVE, PLAN, 64)} == {128, 256}
    write_report(rows, SMALL, tmp_path, ["a condition"])
    with (tmp_path / "recall.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "a condition" in (tmp_path / "README.md").read_text()
    for name in ("effective", "search", "carried"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_measures_nothing_again(model, tokenizer, measured, monkeypatch) -> None:
    rows, _, folder = measured
    for name in ("recall", "profile_length", "solve"):
        monkeypatch.delattr(bench_context, name)
    with at(folder, resume=True) as workspace:
        assert bench_context.bench_context(model, tokenizer, "tiny", SMALL, workspace) == rows


@pytest.mark.parametrize(
    ("stopped", "change"), [("recall", {"questions": 40}), ("profile_length", {"num_samples": 3}), ("solve", {"densities": (0.3,)})]
)  # fmt: skip
def test_other_settings_are_measured_anew(model, tokenizer, measured, monkeypatch, stopped, change) -> None:
    class StoppedError(Exception):
        pass

    def stop(*arguments, **options):
        raise StoppedError

    monkeypatch.setattr(bench_context, stopped, stop)
    with at(measured[2], resume=True) as workspace, pytest.raises(StoppedError):
        bench_context.bench_context(model, tokenizer, "tiny", replace(SMALL, **change), workspace)


def row(length: int, right: int, questions: int = 100, method: str = PLAN, budget: float | None = 100) -> ContextRow:
    low, high = wilson(right, questions)
    share = right / questions
    return ContextRow(EFFECTIVE, method, 0, budget, 512, length, 100.0, questions, right, share, low, high, "")


def test_a_context_is_effective_up_to_the_first_loss() -> None:
    rows = [row(400, 100), row(100, 100), row(300, 89), row(200, 90)]
    found = effective_context(rows)
    assert (found.tokens, found.lost_tokens) == (200, 300)
    assert (found.sure_tokens, found.surely_lost_tokens) == (100, None)
    assert effective_context([row(100, 10)]).tokens == 0
    assert effective_context([row(100, 10)]).surely_lost_tokens == 100
    assert effective_context([row(100, 100)]).lost_tokens is None


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.integers(0, 7))
def test_better_recall_never_shortens_it(rights: list[int], index: int) -> None:
    before = effective_context([row(10 * (i + 1), right) for i, right in enumerate(rights)])
    rights[index % len(rights)] = 100
    after = effective_context([row(10 * (i + 1), right) for i, right in enumerate(rights)])
    assert after.tokens >= before.tokens
    assert after.sure_tokens >= before.sure_tokens
    assert before.sure_tokens <= before.tokens
    assert (before.surely_lost_tokens or 999) >= (before.lost_tokens or 999)


def test_the_page_never_overstates_the_ratio() -> None:
    """The uniform span fails at 125 tokens and the plan last holds at 500: at least 4.0 times, not 500 / 100."""
    dense = [row(n, 100, method=DENSE, budget=None) for n in (100, 250, 500)] + [
        row(1000, 0, method=DENSE, budget=None)
    ]
    uniform = [row(125, 80, method=UNIFORM), row(250, 10, method=UNIFORM)]
    rows = [*dense, *uniform, row(250, 100), row(500, 100), row(1000, 50)]
    assert [r.length_tokens for r in with_dense(rows, UNIFORM, 100)] == [100, 125, 250]
    empty = replace(SMALL, spans_tokens=(100,), search_lengths=(), carried_densities=())
    line = next(line for line in page(rows, empty, []).splitlines() if line.startswith("| 100 "))
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
        "100 (125)", "500 (1,000)", "500 (1,000)", "4.0", "4.0", "4.0",
    ]  # fmt: skip


def test_seeds_share_their_questions() -> None:
    assert over_seeds([row(100, 90), row(100, 100)]) == (0.95, *wilson(95, 100))


def test_a_span_below_the_least_is_refused(measured, model) -> None:
    from moa.errors import InfeasibleError
    from moa.profile.artefact import Profile

    file = next((measured[2] / "stages").glob("profile-*.safetensors"))
    with pytest.raises(InfeasibleError):
        plan_for_span(Profile.load(file), 256, 15, SEARCHES["elastic"])


def test_the_command_names_a_missing_model(tmp_path, capsys) -> None:
    assert run(["bench", "context", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 3
    assert "none" in capsys.readouterr().err
