"""What tests of commands that call lm-eval share."""

from __future__ import annotations

from functools import partialmethod

import pytest


@pytest.fixture
def quick_lm_eval(monkeypatch, tmp_path):
    """No look at the thousands of tasks that lm-eval brings, and a cache of the test's own."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
