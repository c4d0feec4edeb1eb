"""Shared by all tests: hypothesis profiles, no network, where the reference data may lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before any test imports transformers or datasets: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadline: how long an example takes says nothing on a busy machine.
settings.register_profile("moa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moa")


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Third-party measurements and plans, beside the checkout on some machines; never part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no third-party reference data at {folder}")
    return folder
