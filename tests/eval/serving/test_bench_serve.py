"""The whole benchmark on simulated engines: what it finds is what their costs say, and its files say what it found."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from moa.eval.serving.bench_serve import Results, Settings, bench_case
from moa.eval.serving.cases import get_case
from moa.eval.serving.drive import Run, Served
from moa.eval.serving.serve_report import write_report
from moa.eval.serving.stages import BUDGET_SHARE, SLO_STEPS, STEP_BATCH, holds, run_at, set_up
from moa.eval.serving.subjects import Contestant
from moa.eval.serving.verdicts import verdicts

VOCABULARY, CONTEXT = 300, 4096


@pytest.fixture(scope="module")
def results(simulated_opener):
    found = Results()
    case = replace(get_case("demo"), name="simulated")
    settings = Settings(turns=1)
    bench_case(case, simulated_opener, VOCABULARY, CONTEXT, settings, found, lambda *_: None)
    return found


def test_set_up_finds_the_step_and_the_largest_budget_that_leaves_room(simulated_opener, step_cost_s):
    setup = set_up(simulated_opener, VOCABULARY, CONTEXT)
    assert setup.step_s == pytest.approx(step_cost_s(decodes=STEP_BATCH))
    budget, decodes = setup.token_budget, STEP_BATCH - 1
    assert step_cost_s(decodes, budget - decodes) <= BUDGET_SHARE * SLO_STEPS * setup.step_s
    larger = 96  # the next that is tried
    assert budget == 64
    assert step_cost_s(decodes, larger - decodes) > BUDGET_SHARE * SLO_STEPS * setup.step_s


def test_short_contexts_are_probed_with_short_prompts(simulated_opener):
    assert set_up(simulated_opener, VOCABULARY, 300).token_budget == 16  # 32 would take a prompt of 400 tokens


def test_stall_free_batching_meets_its_targets(results):
    found = list(verdicts(results))
    assert len(found) == 4
    assert all(verdict.is_met for verdict in found), found


def test_no_capacity_lies_above_what_gets_done(results):
    (setup,) = results.setups["simulated"]
    for found in results.found:
        assert 0 < found.capacity.holds < found.capacity.fails
        trials = [r for r in results.rows if r.stage == "capacity" and r.subject == found.subject]
        assert {r.holds for r in trials if r.rate <= found.capacity.holds} == {True}
        assert {r.holds for r in trials if r.rate >= found.capacity.fails} <= {False}
        assert all((r.tbt_p99_ms or 0) <= 1e3 * setup.slo_s * 1.001 for r in trials if r.holds)


def test_a_trial_that_is_given_up_would_have_failed(simulated_opener):
    """Giving up early changes no verdict."""
    setup = set_up(simulated_opener, VOCABULARY, CONTEXT)
    ask = replace(get_case("demo").chat, count=30)
    given_up = 0
    for policy in ("sarathi", "prefill-first", "orca"):
        for rate in (0.5, 2.0, 5.0, 12.0, 40.0):
            whole = run_at(setup, ask, Contestant(policy), rate, 1)
            short = run_at(setup, ask, Contestant(policy), rate, 1, may_stop=True)
            assert whole.holds == short.holds
            given_up += short.run.is_given_up
    assert given_up > 3


@pytest.mark.parametrize(
    ("gaps", "wait", "expected"), [([0.1] * 200, 0.1, True), ([0.1] * 195 + [9.0] * 5, 0.1, False)]
)
def test_holds(simulated_opener, gaps, wait, expected):
    setup = replace(set_up(simulated_opener, VOCABULARY, CONTEXT), step_s=0.1)
    times = [wait + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    one = Served(5, len(times), 0.0, 0.0, times, len(times), is_done=True)
    assert holds(setup, Run((one,), times[-1])) is expected
    late = Served(5, len(times), -setup.wait_s - 1, 0.0, times, len(times), is_done=True)
    assert not holds(setup, Run((late,), times[-1]))
    assert not holds(setup, Run((one, Served(5, 1, 0.0, 0.0, error="broken")), times[-1]))


def test_files(results, tmp_path):
    write_report(results, Settings(turns=1), tmp_path)
    names = {"serve.csv", "capacity.csv", "serve.json", "tbt.png", "latency.png", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    rows = list(csv.DictReader((tmp_path / "serve.csv").read_text().splitlines()))
    told = json.loads((tmp_path / "serve.json").read_text())
    assert len(rows) == len(told["runs"]) == len(results.rows)
    assert float(rows[0]["tbt_p99_ms"]) == pytest.approx(told["runs"][0]["p99_itl_ms"], rel=1e-4)
    assert {"device", "threads", "versions", "plan", "date", "command"} <= set(told["moa"])
    page = (tmp_path / "README.md").read_text()
    for word in ("sarathi / prefill-first", "sarathi / orca", "met", "tbt.png", "latency.png"):
        assert word in page
