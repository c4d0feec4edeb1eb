"""Small shapes and cases that every kind of step has."""

from __future__ import annotations

import pytest

from moa.eval.gpu import patterns
from moa.eval.gpu.cases import Case
from moa.eval.gpu.heads import HeadShape

TINY = HeadShape("tiny", 6, 2, 16)


@pytest.fixture(params=["prefill", "chunk", "decode"])
def case(request) -> Case:
    """A step of equal sequences whose windows have moved."""
    pattern = patterns.small(TINY)
    kinds = {
        "prefill": Case("prefill", TINY, pattern, 300, 2),
        "chunk": Case("chunk", TINY, pattern, 401, 2, 130),
        "decode": Case("decode", TINY, pattern, 333, 3),
    }
    return kinds[request.param]
