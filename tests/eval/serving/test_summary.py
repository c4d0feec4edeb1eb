"""Aggregates are what their definitions say, on runs of any shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import UsageError
from moa.eval.serving.console import block
from moa.eval.serving.drive import Run, Served
from moa.eval.serving.summary import (
    METRICS,
    Goals,
    details,
    peak_concurrency,
    peak_output_tokens,
    percentile,
    share_over,
    summary,
    values_s,
)

SECONDS = st.floats(0.001, 50.0)


@st.composite
def requests(draw):
    sent, gaps = draw(st.floats(0, 100)), draw(st.lists(SECONDS, max_size=8))
    one = Served(draw(st.integers(1, 99)), 9, sent, 0.0)
    one.chunk_s = [sent + sum(gaps[: i + 1]) for i in range(len(gaps))]
    one.output_tokens, one.is_done = len(gaps), True
    one.error = draw(st.sampled_from(["", "", "broken"]))
    return one


@st.composite
def runs(draw):
    served = tuple(draw(st.lists(requests(), max_size=12)))
    return Run(served, max((one.chunk_s[-1] for one in served if one.chunk_s), default=1.0))


@given(runs())
def test_definitions(run):
    keys = summary(run)
    good = [one for one in run.served if not one.error and one.chunk_s]
    assert keys["completed"] + keys["failed"] == len(run.served)
    assert keys["total_output_tokens"] == sum(len(one.chunk_s) for one in good)
    assert keys["request_throughput"] * keys["duration"] == pytest.approx(len(good))
    assert values_s(run, "ttft") == [one.chunk_s[0] - one.sent_s for one in good]
    # the mean over requests of TPOT weighs requests, the mean of ITL weighs tokens: their sums of time are the same
    spoken = [one for one in good if len(one.chunk_s) > 1]
    times = sum(one.tpot_s * (len(one.chunk_s) - 1) for one in spoken)
    assert times == pytest.approx(sum(values_s(run, "itl")))
    assert len(values_s(run, "tpot")) == len(spoken)


@given(runs(), st.floats(0, 100))
def test_percentiles_lie_between_order_statistics(run, percent):
    values = sorted(values_s(run, "itl"))
    found = percentile(values, percent)
    if not values:
        assert found is None
        return
    at = percent / 100 * (len(values) - 1)
    assert values[math.floor(at)] - 1e-9 <= found <= values[math.ceil(at)] + 1e-9


@given(st.lists(SECONDS, min_size=1, max_size=300), SECONDS)
def test_a_hundredth_above_a_limit_is_what_its_percentile_says(values, limit):
    """The share is what capacity is judged by, the percentile what is told: they differ by one value at most."""
    share, p99 = share_over(values, limit), percentile(values, 99)
    if share <= 0.01 - 1 / len(values):
        assert p99 <= limit
    if share > 0.01 + 1 / len(values):
        assert p99 > limit


@given(runs(), SECONDS, SECONDS, SECONDS)
def test_goodput_counts_requests_that_meet_every_goal(run, ttft, tpot, e2el):
    texts = [f"ttft:{1e3 * ttft}", f"tpot:{1e3 * tpot}", f"e2el:{1e3 * e2el}"]
    each = [summary(run, Goals.of([text]))["request_goodput"] for text in texts]
    every = summary(run, Goals.of(texts))["request_goodput"]
    assert every <= min(each) + 1e-12
    assert max(each) <= summary(run)["request_throughput"] + 1e-12
    good = sum(
        not one.error
        and bool(one.chunk_s)
        and one.chunk_s[0] - one.sent_s <= ttft * (1 + 1e-12)
        and one.tpot_s <= tpot * (1 + 1e-12)
        and one.chunk_s[-1] - one.sent_s <= e2el * (1 + 1e-12)
        for one in run.served
    )
    assert every * run.duration_s == pytest.approx(good)


@given(runs())
def test_peaks(run):
    good = [one for one in run.served if one.has_succeeded]
    at = [sum(a.sent_s <= b.sent_s < a.chunk_s[-1] for a in good) for b in good]  # a peak begins where somebody starts
    assert peak_concurrency(run) == max(at, default=0)
    times = [t for one in good for t in one.chunk_s]
    assert peak_output_tokens(run) == max((sum(int(t) == int(u) for u in times) for t in times), default=0)


def test_one_token_takes_no_time_per_token():
    one = Served(5, 1, 1.0, 0.0, [3.0], 1, is_done=True)
    run = Run((one,), 3.0)
    assert values_s(run, "tpot") == values_s(run, "itl") == []
    assert summary(run)["p99_itl_ms"] is None
    assert summary(run, Goals.of(["tpot:0.001"]))["request_goodput"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("text", ["itl:5", "ttft", "ttft:fast", "ttft:-1", "ttft:nan"])
def test_goals_that_cannot_be(text):
    with pytest.raises(UsageError, match="goodput"):
        Goals.of([text])


def test_console_block_has_the_lines_that_parsers_look_for():
    served = tuple(Served(10, 3, i * 1.0, 0.0, [i + 0.5, i + 0.6, i + 0.8], 3, is_done=True) for i in range(4))
    lines = block(summary(Run(served, 3.8), Goals.of(["ttft:600"])), 1.0, 8).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[-1] == "=" * 50
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "---------------Inter-token Latency----------------" in lines
    assert "----------------End-to-end Latency----------------" in lines
    told = {line.split(":")[0]: line.split(":")[1].strip() for line in lines if ":" in line}
    assert told["Successful requests"] == "4"
    assert told["Maximum request concurrency"] == "8"
    assert told["Request goodput (req/s)"] == told["Request throughput (req/s)"] == "1.05"
    assert told["P99 TTFT (ms)"] == "500.00"
    assert told["Mean ITL (ms)"] == "150.00"


def test_keys_are_those_of_the_benchmark_that_everybody_knows():
    run = Run((Served(10, 2, 0.0, 0.0, [0.5, 0.6], 2, is_done=True), Served(7, 2, 0.1, 0.0, error="refused")), 0.6)
    keys = summary(run) | details(run)
    statistics = ("mean", "median", "std", "p50", "p90", "p95", "p99")
    assert {f"{name}_{metric}_ms" for name in statistics for metric in METRICS} <= set(keys)
    assert keys["failed"] == 1
    assert keys["errors"] == ["", "refused"]
    assert keys["ttfts"] == [0.5, 0.0]
    assert np.allclose(keys["itls"][0], [0.1])
    assert {"input_lens", "output_lens", "latencies", "start_times", "queue_times"} <= set(keys)
