"""A saved model takes its plan along, in a file of its own, and the folder is all that apply() wants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moa.errors import PlanError, UsageError
from moa.hf import apply
from moa.plan import PLAN_NAME


def test_a_saved_model_takes_its_plan_along(model, plan, prompts, make, tmp_path: Path) -> None:
    with apply(model, plan):
        want = model.generate(prompts, **make.greedy)
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with apply(again, tmp_path) as attachment:
        assert attachment.plan == plan
        assert torch.equal(again.generate(prompts, **make.greedy), want)


def test_but_for_the_plan_the_folder_is_as_without_one(model, plan, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "before")
    with apply(model, plan):
        model.save_pretrained(tmp_path / "attached")
    model.save_pretrained(tmp_path / "after")
    files = {d: {f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("before", "attached", "after")}
    assert files["before"] == files["after"]
    assert files["attached"].pop(PLAN_NAME)
    assert files["attached"] == files["before"]
    assert "moa" not in json.dumps(json.loads(files["attached"]["config.json"]))


def test_pushing_while_saving_is_refused_and_other_ranks_write_no_plan(model, plan, tmp_path: Path) -> None:
    with apply(model, plan):
        with pytest.raises(UsageError, match=r"call model\.push_to_hub"):
            model.save_pretrained(tmp_path, push_to_hub=True)
        model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not list(tmp_path.rglob(PLAN_NAME))


def test_a_model_trained_on_is_another_to_its_plan(model, plan, tmp_path: Path) -> None:
    with apply(model, plan), torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="allow_other_weights"):
        apply(again, tmp_path)
    apply(again, tmp_path, allow_other_weights=True).detach()
