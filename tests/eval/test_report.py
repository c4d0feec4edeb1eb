"""Reports survive JSON, say their numbers in text, and come with pictures."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys

import pytest
from rich.console import Console

from moa.errors import InputError, UsageError
from moa.eval.figures import accuracy_curves, pareto_picture, span_heat_map
from moa.eval.markdown import table, to_markdown
from moa.eval.records import (
    Conditions,
    DepthScore,
    Environment,
    FamilyScore,
    LossAt,
    MethodResult,
    ParetoPoint,
    Perplexity,
    PlanRef,
    RecallAtLength,
    RecallTask,
    Report,
    Score,
    SideSpeed,
    Speed,
    Spread,
)
from moa.eval.report import load_report, terminal_table, to_json, write_report
from moa.plan import ModelShape, Plan

LENGTHS = (1024, 2048, 4096)
SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=3, heads=4, kv_heads=2, head_dim=16)
ENVIRONMENT = Environment(
    device="cpu (x86_64)",
    dtype="float32",
    threads=2,
    moa="0.1.0",
    torch="2.13.0",
    transformers="5.23.0",
    python="3.11.7",
)


def recall_at(n_tokens, right):
    score = Score.of(right=right, questions=100, nll_sum=12.5, answer_tokens=125)
    return RecallAtLength(
        length_tokens=n_tokens,
        texts=12,
        overall=score,
        families=(FamilyScore(family="single", score=score), FamilyScore(family="chain", score=score)),
        depths=(DepthScore(from_ratio=0.0, to_ratio=0.5, score=score),),
    )


def method(name, density, right):
    plan = Plan.uniform(SHAPE, len(name), density)  # another plan for every method
    perplexities = tuple(Perplexity(length_tokens=n, texts=2, scored_tokens=1023, seed=0, nll=1.5) for n in LENGTHS)
    return MethodResult(
        method=name,
        density_budget_ratio=density,
        plan=PlanRef.of(plan, LENGTHS),
        backend="torch",
        recall=tuple(recall_at(n, right) for n in LENGTHS),
        perplexity=perplexities,
    )


def side(attention, kv_bytes):
    seconds, rates = Spread.of([0.5, 0.25, 0.75]), Spread.of([111.0, 100.0, 120.0])
    return SideSpeed(attention=attention, prefill_s=seconds, decode_tokens_per_s=rates, kv_bytes=kv_bytes)


@pytest.fixture
def report():
    methods = [
        method(name, density, right)
        for name, rights in (("uniform", (51, 33, 17)), ("moa-estimator", (90, 70, 30)), ("joint", (97, 95, 88)))
        for density, right in zip((0.5, 0.25, 0.125), rights, strict=True)
    ]
    return Report(
        title="moa on a made-up model",
        conditions=Conditions(
            model_name="made-up",
            model_fingerprint="f" * 64,
            architecture="LlamaForCausalLM",
            parameters=1234567,
            environment=ENVIRONMENT,
            task=RecallTask(),
            lengths_tokens=(512, *LENGTHS),
            date="2026-01-02T03:04:05+00:00",
            command="moa demo -o 'a folder'",
        ),
        dense=MethodResult(method="dense", backend="sdpa", recall=tuple(recall_at(n, 99) for n in (512, *LENGTHS))),
        methods=tuple(methods),
        speed=(
            Speed(
                plan_sha256=methods[-1].plan.sha256,
                density_ratio=0.125,
                length_tokens=4096,
                prompt_tokens=4064,
                decode_tokens=32,
                rounds=3,
                seed=0,
                environment=ENVIRONMENT,
                dense=side("sdpa", 8 << 20),
                sparse=side("torch", 1 << 20),
            ),
        ),
        pareto=tuple(
            ParetoPoint(
                density_ratio=0.25,
                losses=(LossAt(length_tokens=1024, loss=1.0 + i), LossAt(length_tokens=4096, loss=5.0 - i)),
                chosen=i == 1,
                validation_loss=0.125 if i == 1 else None,
            )
            for i in range(4)
        ),
    )


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_json_loads_back_equal(report, tmp_path):
    paths = write_report(report, tmp_path, plan=Plan.uniform(SHAPE, 64, 0.25))
    assert {p.name for p in paths} == {"report.json", "report.md", "accuracy.png", "pareto.png", "spans-4096.png"}
    assert sorted(tmp_path.iterdir()) == sorted(paths), "nothing else is left behind"
    assert load_report(tmp_path) == load_report(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["methods"][0]["plan"]["sha256"]


def test_written_pictures_are_pictures(report, tmp_path):
    for path in write_report(report, tmp_path, plan=Plan.uniform(SHAPE, 64, 0.25), span_lengths_tokens=(1024, 4096)):
        if path.suffix == ".png":
            assert min(png_size(path.read_bytes())) > 300
            assert f"({path.name})" in (tmp_path / "report.md").read_text()


def test_the_text_says_the_numbers_and_their_conditions(report):
    text = to_markdown(report)
    for said in (
        "1,234,567 parameters",
        "moa 0.1.0, torch 2.13.0, transformers 5.23.0",
        "cpu (x86_64), float32, 2 threads",
        "2026-01-02T03:04:05+00:00",
        "`moa demo -o 'a folder'`",
        "seed 0",
        "0.97 [0.92, 0.99]",
        "uniform span (StreamingLLM), 12.5 %",
        "MoA's estimator, 25 %",
        "1.105",  # exp(12.5 / 125)
        "4.482",  # exp(1.5)
        "0.500 (0.250 to 0.750)",
        "111 (100 to 120)",
        "8.00 MiB",
        "moa, 12.5 % (torch)",
        report.methods[0].plan.sha256[:12],
    ):
        assert said in text
    chosen = next(line for line in text.splitlines() if line.rstrip(" |").endswith("yes"))
    assert "0.125" in chosen


def test_every_table_is_well_formed(report):
    blocks = [b.splitlines() for b in to_markdown(report).split("\n\n") if b.startswith("|")]
    assert len(blocks) == 1 + 4 + 4 + 1 + 1 + 1 + 1 + 1
    for lines in blocks:
        assert len({line.count("|") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1


def test_a_bar_in_a_name_does_not_break_a_table():
    assert table(["a", "b"], [["x|y", "1"]]).splitlines()[-1] == "| x\\|y |   1 |"


def test_a_report_of_one_plan_and_nothing_else(report, tmp_path):
    small = report.model_copy(update={"methods": report.methods[-1:], "speed": (), "pareto": ()})
    assert {p.name for p in write_report(small, tmp_path)} == {"report.json", "report.md", "accuracy.png"}
    bare = small.model_copy(update={"methods": (), "dense": MethodResult(method="dense", backend="sdpa")})
    assert to_markdown(bare).startswith("# moa on a made-up model")
    assert terminal_table(bare).row_count == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: {**r, "titel": "x"}, "did you mean 'title'"),
        (lambda r: {k: v for k, v in r.items() if k != "dense"}, "'dense' is missing"),
        (lambda r: {**r, "schema_version": 2}, "schema_version"),
    ],
)
def test_what_is_no_report_is_refused(report, tmp_path, damage, said):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(damage(json.loads(to_json(report)))))
    with pytest.raises(InputError, match=said):
        load_report(path)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match="not a report"):
        load_report(tmp_path)


def test_the_terminal_table_fits_eighty_columns(report):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115  # closed with the test
    with console.file:
        console.print(terminal_table(report))
    lines = console.export_text().splitlines()
    (last,) = [line for line in lines if " moa, 12.5 % " in line]
    assert last.count("88 %") == 3
    assert last.split("│")[-2].strip() == "12.6 %"  # what the spans keep, alpha included, not the budget
    assert "…" not in "".join(lines)


def test_odd_heat_maps():
    rng = random.Random(0)
    one = ModelShape(architecture="x", layers=1, heads=1, kv_heads=1, head_dim=8)
    many = ModelShape(architecture="x", layers=80, heads=8, kv_heads=8, head_dim=8)
    png_size(span_heat_map(Plan.uniform(one, 0, 1.0), 1))
    rules = tuple(tuple((0, rng.random()) for _ in range(8)) for _ in range(80))
    assert max(png_size(span_heat_map(Plan(model=many, rules=rules), 131072))) < 4000


def test_odd_curves_and_fronts(report):
    one = report.model_copy(update={"methods": report.methods[-1:]})
    png_size(accuracy_curves(one))
    png_size(pareto_picture([ParetoPoint(density_ratio=d, losses=report.pareto[0].losses[:1]) for d in (0.5, 0.25)]))
    with pytest.raises(UsageError, match="same lengths"):
        pareto_picture([report.pareto[0], ParetoPoint(density_ratio=0.5, losses=report.pareto[0].losses[:1])])
    with pytest.raises(UsageError, match="at least one method"):
        accuracy_curves(report.model_copy(update={"methods": ()}))


def test_pictures_are_the_same_bytes_again(report):
    assert accuracy_curves(report) == accuracy_curves(report)


def test_reading_a_report_loads_no_matplotlib_and_no_torch():
    code = "import sys, moa.eval.report; sys.exit(bool({'matplotlib', 'torch', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
