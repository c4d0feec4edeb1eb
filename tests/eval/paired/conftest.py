"""A random model and a plan for it, and a cache of each test's own."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from moa.hf.shape import model_shape
from moa.plan import Plan


@pytest.fixture(scope="session")
def tiny_plan(tiny_folder):
    shape = model_shape(AutoModelForCausalLM.from_pretrained(tiny_folder))
    return Plan.uniform(shape, 0, 0.25, sink_tokens=4, min_span_tokens=16)


@pytest.fixture
def plan_file(tiny_plan, tmp_path):
    path = tmp_path / "plan.json"
    tiny_plan.save(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
