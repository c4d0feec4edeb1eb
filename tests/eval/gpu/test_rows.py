"""The CSV is whole after every row, survives a kill, and is resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moa.errors import InputError, UsageError
from moa.eval.gpu.rows import Row, RowFile, latest, read_rows

ROW = Row("c", "decode", "H", "dense", False, 4096, 1, 0, 0, "bf16", "moa", "same", "ok", median_us=12.25, turns=7)


def test_rows_come_back_as_they_were(tmp_path) -> None:
    rows = [ROW, replace(ROW, subject="peer, 'quoted'", status="failed", reason='it said "no",\nthen more')]
    rows.append(replace(ROW, published=True, error=0.001234567, device="GPU"))
    file = RowFile(tmp_path / "rows.csv")
    for row in rows:
        file.add(row)
        assert len(read_rows(file.path)) == len(file.rows)
    assert read_rows(file.path) == [*rows[:2], replace(rows[2], error=0.00123457)]


def test_an_unfinished_line_is_dropped_and_the_file_goes_on(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    RowFile(path).add(ROW)
    with path.open("ab") as file:
        file.write(b"c2,decode,H,dense,Fal")
    again = RowFile(path)
    assert again.rows == [ROW]
    again.add(replace(ROW, case="c3"))
    assert [row.case for row in read_rows(path)] == ["c", "c3"]


def test_what_is_settled_is_left_alone_and_the_last_row_counts(tmp_path) -> None:
    file = RowFile(tmp_path / "rows.csv")
    file.add(replace(ROW, status="failed", reason="it fell"))
    for each in (file, RowFile(file.path)):
        assert each.is_done("c", "moa")
        assert each.reason("c", "moa") == "it fell"
        assert not each.is_done("c", "other")
    file.add(ROW)
    assert file.reason("c", "moa") == ""
    assert [row.status for row in latest(file.rows)] == ["ok"]
    file.compact()
    assert read_rows(file.path) == [ROW]


def test_devices_do_not_mix_and_other_files_are_refused(tmp_path) -> None:
    file = RowFile(tmp_path / "rows.csv")
    file.add(replace(ROW, device="A"))
    file.check_device("A")
    with pytest.raises(UsageError, match="'A', this is 'B'"):
        file.check_device("B")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="columns"):
        RowFile(other)
    assert other.read_text() == "a,b\n1,2\n"
