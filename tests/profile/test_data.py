"""Samples as data: what their digest tells apart, and answers that must be there."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from moa.errors import DataError
from moa.profile import data

SAMPLE = data.TextSample((5, 6, 7, 8), (2, 3), (7, 8), truncated_tokens=9)


def test_samples_come_back_from_json() -> None:
    assert data.samples_from(json.loads(json.dumps([asdict(SAMPLE)]))) == (SAMPLE,)
    for wrong in ([], {}, None):
        with pytest.raises(ValueError, match="list of samples"):
            data.samples_from(wrong)


@pytest.mark.parametrize("change", [{"token_ids": (5, 6, 7, 9)}, {"answer_ids": (7, 7)}, {"answer_positions": (1, 3)}])
def test_the_digest_tells_samples_apart(change) -> None:
    assert data.digest([SAMPLE]) == data.digest([SAMPLE])
    assert data.digest([SAMPLE]) != data.digest([replace(SAMPLE, **change)])


def test_references_are_required_where_they_count() -> None:
    bare = replace(SAMPLE, answer_positions=(), answer_ids=())
    with pytest.raises(DataError, match="file: 1 of 2 samples have no 'answer'"):
        data.require_answers([SAMPLE, bare], "file")
    assert data.require_answers([SAMPLE], "file") == (SAMPLE,)
