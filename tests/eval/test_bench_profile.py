"""`moa bench profile` measures every kind of pass and writes what it measured."""

from __future__ import annotations

import csv
import sys

import pytest

from moa.errors import UsageError
from moa.eval import bench_profile, cost_report
from moa.eval.bench_profile import CHECKPOINTED, INPUTS, KINDS, PROFILE, STEP, CostRow, bench_costs, ratios, slope

ROWS = [
    CostRow(
        n, kind, seconds * n / 1000, int(size * n), int(1.02 * size * n) if kind in (PROFILE, CHECKPOINTED) else None
    )
    for n in (1000, 2000, 4000)
    for kind, seconds, size in (
        (STEP, 1.0, 500.0),
        (INPUTS, 0.8, 400.0),
        (PROFILE, 1.3, 450.0),
        (CHECKPOINTED, 1.6, 200.0),
    )
]


def test_slopes_and_ratios() -> None:
    assert slope(ROWS, PROFILE) == pytest.approx(1.0)
    assert slope([CostRow(n, STEP, 1.0, n * n, None) for n in (10, 100)], STEP) == pytest.approx(2.0)
    assert list(ratios(ROWS)) == [(n, pytest.approx(0.9), pytest.approx(1.3)) for n in (1000, 2000, 4000)]


def test_the_report_holds_what_was_measured(tmp_path) -> None:
    cost_report.write_report(ROWS, tmp_path, 3)
    with (tmp_path / "costs.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [(int(r["n_tokens"]), r["kind"], int(r["peak_bytes"])) for r in read] == [
        (r.n_tokens, r.kind, r.peak_bytes) for r in ROWS
    ]
    page = (tmp_path / "README.md").read_text()
    for part in ("0.90 | 1.30", "power of 1.000 for profiling", "1.020", "1 thread", "median of 3"):
        assert part in page
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_short_length_is_measured_in_a_process_of_its_own() -> None:
    done = []
    rows = bench_costs([512], 1, lambda *at: done.append(at))
    assert [row.kind for row in rows] == list(KINDS)
    assert all(row.seconds > 0 for row in rows)
    assert [row.predicted_bytes is not None for row in rows] == [False, False, True, True]
    assert done == [("profile cost", 1, 1)]


def test_every_kind_leaves_the_model_as_it_was() -> None:
    model = bench_profile.bench_model()
    for kind in KINDS:
        bench_profile._run(model, bench_profile._sample(256), kind)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_lengths_that_cannot_be_meant(tmp_path) -> None:
    from moa.cli.bench import profile

    for wrong in ("many", "12"):
        with pytest.raises(UsageError, match="--lengths must be"):
            profile(tmp_path, wrong, 1)
