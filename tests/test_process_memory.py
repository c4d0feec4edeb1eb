"""What the system tells of this process's memory, and what is said where it tells nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moa import process_memory
from moa.errors import ResourceError

MIB = 1 << 20
only_linux = pytest.mark.skipif(not process_memory.CLEAR.exists(), reason="only Linux tells a process's memory")


@only_linux
def test_the_peak_is_since_the_reset_and_the_rest_goes_back() -> None:
    process_memory.give_back()
    process_memory.reset_peak()
    before = process_memory.held_bytes()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    assert process_memory.held_bytes() - before > 60 * MIB
    del block
    process_memory.give_back()
    assert process_memory.peak_bytes() - before > 60 * MIB
    assert process_memory.held_bytes() - before < 8 * MIB
    process_memory.reset_peak()
    assert process_memory.peak_bytes() - before < 8 * MIB


@pytest.mark.parametrize("text", [None, "VmSize:  12 kB\n"])
def test_a_system_that_does_not_tell_is_named(text: str | None, tmp_path: Path, monkeypatch) -> None:
    if text is not None:
        (tmp_path / "status").write_text(text)
    monkeypatch.setattr(process_memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(process_memory, "CLEAR", tmp_path / "none" / "clear_refs")
    for ask in (process_memory.held_bytes, process_memory.peak_bytes, process_memory.reset_peak):
        with pytest.raises(ResourceError, match="run this on Linux"):
            ask()
