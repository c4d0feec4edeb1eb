"""The card says what the plan says, in front matter that YAML reads and text that Markdown leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moa.cli import app as cli
from moa.plan import Calibration, CreatedBy, ModelShape, Objective, Plan, SolverRecord, Validation
from moa.plan_card import plan_card

SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=8, name="org/base-8B")
SEEN = Validation(length_tokens=4096, samples=8, dense_loss=1.25, sparse_loss=1.5, candidates=3)


def plan_of(name: str = "org/base-8B", dataset: str = "org/texts", **fields: object) -> Plan:
    plan = Plan.uniform(
        SHAPE.model_copy(update={"name": name, "architecture": name or "x"}),
        0,
        0.5,
        sink_tokens=4,
        min_span_tokens=16,
        validation=SEEN,
        objective=Objective(predicted_loss=0.1, density_budget_ratio=0.5, lengths_tokens=(1024,)),
        solver=SolverRecord(name=name, status=name, milp_status="optimal", bound=0.0, gap_ratio=0.0),
        calibration=Calibration(
            dataset=dataset,
            dataset_sha256=dataset,
            samples_per_length=2,
            lengths_tokens=(1024,),
            seed=0,
            estimator=dataset,
            supervision=dataset,
        ),
        created_by=CreatedBy(moa=name, torch=name, transformers=name),
    )
    content = {key: getattr(plan, key) for key in Plan.model_fields}
    return Plan.model_validate({**content, "lengths": (plan.at_length(1024),), "sha256": "", **fields})


def test_a_narrowed_search_is_told_and_a_full_one_is_not() -> None:
    objective = Objective(predicted_loss=0.1, density_budget_ratio=0.5, lengths_tokens=(1024,))
    assert "chosen from" not in plan_card(plan_of(objective=objective))
    narrowed = objective.model_copy(update={"elastic": False, "per_layer": True})
    assert "fixed windows only, one rule per layer" in plan_card(plan_of(objective=narrowed))


def front_of(card: str) -> dict[str, object]:
    """The front matter, cut out as hubs do it."""
    found = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", card)
    assert found
    return yaml.safe_load(found[2])


def test_front_matter_for_a_hub() -> None:
    plan = plan_of()
    front = front_of(plan_card(plan))
    assert front["base_model"] == "org/base-8B"
    assert front["library_name"] == "moa"
    assert "kv-cache" in front["tags"]
    assert front["moa"] == {
        "plan_sha256": plan.sha256,
        "architecture": "org/base-8B",
        "lengths_tokens": [1024],
        "density_ratio": [plan.lengths[0].density_ratio],
        "validation": {"length_tokens": 4096, "dense_loss": 1.25, "sparse_loss": 1.5},
    }


def test_a_baseline_has_a_card_without_a_gap() -> None:
    made = SolverRecord(name="pyramid", status="baseline", milp_status="not needed", bound=None, gap_ratio=None)
    assert "`pyramid, baseline`" in plan_card(plan_of(solver=made))


def test_the_text_has_costs_and_losses_beside_dense() -> None:
    plan = plan_of()
    card = plan_card(plan)
    assert f"| 1,024  |    {100 * plan.lengths[0].density_ratio:.3g} % | " in card
    assert f"{plan.kv_bytes(1024) / 1024:.2f} KiB" in card
    assert "128.00 KiB" in card  # dense: 1024 tokens x 2 layers x 2 heads x (key, value) x 8 x 4 bytes
    assert re.search(r"\| dense +\| +1\.2500 \| +3\.4903 \|", card)
    assert re.search(r"\| this plan \| +1\.5000 \| +4\.4817 \|", card)
    assert 'from_pretrained("org/base-8B")' in card
    assert plan.sha256 in card
    assert plan_card(plan) == card


def test_what_was_not_measured_is_called_so() -> None:
    plan = Plan.uniform(SHAPE, 0, 0.5)
    card = plan_card(plan)
    assert "Not measured." in card
    assert "| 65,536 |" in card
    assert "validation" not in front_of(card)["moa"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("demo", "PATH/TO/demo"),
        ("", "PATH/TO/MODEL"),
        ("/home/me/llama", "PATH/TO/llama"),
        ("C:\\Users\\me\\llama\\", "PATH/TO/llama"),
        ("org/base-8B", "org/base-8B"),
    ],
)
def test_a_model_that_is_no_hub_id_is_shown_as_the_reader_s_own_copy(name, shown) -> None:
    """A line with the bare name of a folder would make transformers look for another model on a hub."""
    card = plan_card(plan_of(name, "/home/me/texts.jsonl"))
    (line,) = [line for line in card.splitlines() if line.startswith("model = ")]
    hint = "" if shown == name else "  # the folder of your copy of this model, or its hub id"
    assert line == f'model = AutoModelForCausalLM.from_pretrained("{shown}"){hint}'
    assert re.search(r"\| calibration data +\| +`texts.jsonl` \|", card)
    heading = shown.removeprefix("PATH/TO/").replace("MODEL", "x")
    assert f"# Attention plan for `{heading}`" in card


@pytest.mark.parametrize("name", ["", "demo", "/home/me/model", "org/a/b", "org/x\n---\nlicense: mit", "../x", "-/x"])
def test_a_name_that_is_no_hub_id_is_no_base_model(name) -> None:
    assert "base_model" not in front_of(plan_card(plan_of(name)))


EVIL = [
    "\n---\nlicense: mit\n---\n",
    "```\n# hi\n",
    "`|`<script>",
    "![x](http://x)",
    "a: b #c",
    "'\"",
    "\u2028\x85",
    "x" * 9999,
]


@pytest.mark.parametrize("text", EVIL)
def test_strings_of_the_plan_are_data(text) -> None:
    check(text)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_string_of_the_plan_is_data(text) -> None:
    check(text)


def check(text: str) -> None:
    """The card of a plan full of `text` has the frame of one that is harmless."""
    card, plain = plan_card(plan_of(text, text)), plan_card(plan_of("x", "x"))
    assert front_of(card).keys() == front_of(plain).keys()
    frame = [[line for line in c.splitlines() if line.startswith(("#", "```", "---"))] for c in (card, plain)]
    headings = [[line for line in lines if not line.startswith("# ")] for lines in frame]
    assert headings[0] == headings[1]
    for line in card.partition("\n---\n")[2].splitlines():
        if line.startswith("model = "):
            assert "`" not in line
            assert isinstance(compile(line, "card", "exec"), object)
            continue
        outside = re.sub(r"(?<!`)`(?!``)[^`]*`", "", line)  # code spans, where nothing is read
        assert not re.search(r"<|!\[|http|\]\(", outside), line
        if line.startswith("|"):
            assert re.sub(r"\\\|", "", line).count("|") in (3, 4, 5)


def test_the_command_writes_it_to_stdout_or_a_file(tmp_path: Path, capsys) -> None:
    plan = plan_of()
    plan.save(tmp_path / "plan.json")
    assert cli.run(["plan", "card", str(tmp_path)]) == 0
    assert capsys.readouterr().out == plan_card(plan)
    file = tmp_path / "README.md"
    assert cli.run(["plan", "card", str(tmp_path), "-o", str(file)]) == 0
    assert file.read_text() == plan_card(plan)
    assert cli.run(["plan", "card", str(tmp_path), "-o", str(file)]) == 2
    assert cli.run(["plan", "card", str(tmp_path), "-o", str(file), "--overwrite"]) == 0
