"""A file of rules is read as it stands, or refused with the entry that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa.errors import DataError
from moa.optimize.rules_file import read_rules
from moa.spans import ElasticRule


@pytest.mark.parametrize(
    ("name", "text"),
    [("rules.json", "[[64, 0.0], [-512, 0.5], [0, 1]]"), ("rules.yaml", "- [64, 0]\n- [-512, 0.5]\n- [0, 1]\n")],
)
def test_json_and_yaml_give_the_rules_in_order(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_rules(tmp_path / name) == (ElasticRule(64, 0.0), ElasticRule(-512, 0.5), ElasticRule(0, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "1 to 1000 pairs"),
        ("{}", "got dict"),
        ("[[64]]", "entry 0: a rule is a pair"),
        ("[[64, 0], [64, 0.5, 1]]", "entry 1: a rule is a pair"),
        ('[["64", 0]]', "entry 0: a rule is a pair"),
        ("[[true, 0]]", "entry 0: a rule is a pair"),
        ("[[64.5, 0]]", "entry 0: alpha must be a whole number"),
        ("[[64, 1.5]]", "entry 0: beta must lie in"),
        ("[[64, -0.1]]", "entry 0: beta must lie in"),
        ("[[64, NaN]]", "entry 0: beta must lie in"),
        ("[[Infinity, 0]]", "entry 0: alpha"),
        ("[[NaN, 0]]", "entry 0: alpha"),
        ("[[64, 0], [0, 1], [64, 0.0]]", "entry 2 repeats entry 0"),
        ("[[64, 0]", "cannot be read"),
        (f"{[[i, 0] for i in range(1001)]}", "1001 entries"),
    ],
)
def test_what_is_no_list_of_rules_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rules(tmp_path / "rules.json")


def test_files_that_are_not_there_or_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rules(tmp_path / "none.yaml")
    (tmp_path / "rules.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_rules(tmp_path / "rules.yaml")
