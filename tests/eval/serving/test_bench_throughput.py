"""The whole throughput benchmark on a tiny model: its rows, and what its page says of targets. No times are judged."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from moa.errors import UsageError
from moa.eval.serving import bench_throughput as bench
from moa.eval.serving.bench_throughput import Results, Settings
from moa.eval.serving.cases import Ask, get_case, random_model
from moa.eval.serving.throughput_report import verdicts, write_report
from moa.eval.serving.throughput_rows import LongRow, OfflineRow, OverheadRow
from moa.eval.serving.workload import Lengths

SETTINGS = Settings(turns=1, long_tokens=512)


def tiny():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return random_model(**sizes, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def case():
    ask = Ask(Lengths(20, 40, 4, 60), Lengths(4, 6), 5)
    return replace(get_case("demo"), name="tiny", make=tiny, make_long=tiny, offline=ask)


@pytest.fixture(scope="module")
def results(case):
    return bench.bench_throughput([case], SETTINGS, lambda *_: None)


def test_everybody_serves_the_same_requests(results):
    assert [row.subject for row in results.offline] == [
        "moa",
        "transformers, continuous batching",
        "transformers, generate() in a loop",
    ]
    assert len({(row.requests, row.input_tokens, row.output_tokens) for row in results.offline}) == 1
    assert results.offline[0].requests == 5


def test_a_plan_of_a_quarter_holds_more_long_texts_than_the_budget_of_four_dense_ones(results):
    dense, plan = sorted(results.long, key=lambda row: row.subject)
    assert dense.concurrent == SETTINGS.dense_requests
    assert plan.concurrent >= 2.5 * dense.concurrent
    assert dense.kv_budget_bytes == plan.kv_budget_bytes
    assert plan.decode_tokens_per_s == pytest.approx(1e3 * plan.concurrent / plan.decode_step_ms)


def test_overhead_is_of_pure_decode_steps_of_a_full_batch(results):
    (row,) = results.overhead
    assert row.batch == 32
    assert row.steps >= bench.OVERHEAD_STEPS - 2
    assert 0 < row.overhead_ratio < 1
    assert 0 < row.overhead_ms < row.step_ms


def test_files(results, tmp_path):
    write_report(results, SETTINGS, tmp_path)
    names = {"offline.csv", "long.csv", "overhead.csv", "throughput.json", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(list(csv.DictReader((tmp_path / "offline.csv").read_text().splitlines()))) == 3
    told = json.loads((tmp_path / "throughput.json").read_text())
    assert len(told["long"]) == 2
    assert told["moa"]["plan"] == "dense"
    page = (tmp_path / "README.md").read_text()
    for word in ("continuous batching", "25 % plan", "at most 0.05", "512 tokens"):
        assert word in page


def test_targets_are_held_against_ratios_within_a_turn(case):
    def offline(subject, turn, speed):
        return OfflineRow("tiny", subject, turn, 1, 1, 1, 1.0, 1.0, speed, 1.0)

    found = Results(
        offline=[
            *(offline("moa", turn, speed) for turn, speed in enumerate((10.0, 20.0, 30.0))),
            *(
                offline("transformers, continuous batching", turn, speed)
                for turn, speed in enumerate((11.0, 10.0, 10.0))
            ),
            *(
                offline("transformers, generate() in a loop", turn, speed)
                for turn, speed in enumerate((4.0, 7.0, 11.0))
            ),
        ],
        long=[LongRow("tiny", name, 0, 9, 9, n, 1.0, s) for name, n, s in (("moa", 4, 5.0), ("moa, plan", 10, 4.0))],
        overhead=[
            OverheadRow("tiny", turn, 32, 9, 9, 1.0, 1.0, share) for turn, share in enumerate((0.01, 0.06, 0.04))
        ],
        cases={"tiny": case},
    )
    told = [(round(verdict.figure, 3), verdict.is_met) for verdict in verdicts(found)]
    assert told == [(2.0, True), (2.727, False), (2.5, True), (0.8, False), (0.04, True)]


def test_short_contexts_are_refused(case):
    short = replace(case, make_long=lambda: tiny_of(256))
    with pytest.raises(UsageError, match="reads 256 tokens, not 512"):
        bench._long_model(short, 512)


def tiny_of(context):
    model = tiny()
    model.config.max_position_embeddings = context
    return model
