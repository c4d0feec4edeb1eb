"""Rows from files, folders and a hub's cache: three shapes, other names, and refusals that name file, line and key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import DataError, UsageError
from moa.profile import hub
from moa.profile.dataset import Row, parse_columns, read_rows, split_rows

ROW = '{"prompt": "the dog", "answer": "10"}'
ROWS = [{"input": f"question {i}", "output": f"answer {i}", "id": i} for i in range(5)]
READ = tuple(Row((("user", f"question {i}"),), f"answer {i}") for i in range(5))
COLUMNS = "prompt=input,answer=output"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no samples; wanted rows like"),
        ("\n \n", "no samples"),
        (ROW + "\n{bad", "line 2: not JSON"),
        ("[1]", "line 1: wanted a JSON object, got list"),
        ("null", "line 1: wanted a JSON object, got NoneType"),
        ('{"promt": "x"}', "line 1: unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": "x", "weight": 1}', "unknown key 'weight'; known are prompt, answer, context, messages, text"),
        ('{"answer": "x"}', "none of 'prompt', 'messages' and 'text'"),
        ("{}", "none of 'prompt', 'messages' and 'text'"),
        ('{"prompt": "x", "text": "y"}', "both 'prompt' and 'text'"),
        ('{"text": "x", "answer": "y"}', "'answer' belongs to a 'prompt'"),
        ('{"prompt": 3}', "'prompt' must be a text that is not empty, got 3"),
        ('{"prompt": ""}', "'prompt' must be a text"),
        ('{"prompt": " "}', "'prompt' must be a text"),
        ('{"prompt": "x", "answer": null}', "'answer' must be a text that is not empty, got None"),
        ('{"prompt": "x", "answer": ["y"]}', "'answer' must be a text"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": "x"}', "'messages' must be a list of {role, content}, got 'x'"),
        ('{"messages": []}', "holds no turn that could be answered"),
        ('{"messages": [{"role": "assistant", "content": "y"}]}', "holds no turn"),
        ('{"messages": [{"role": "user"}]}', "'messages'[0] must be {role, content}"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "'messages'[0]['content'] must be a text"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 1: not JSON"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text, message) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=r"rows\.jsonl") as caught:
        read_rows(str(file))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("none", "none.jsonl", "none.parquet"):
        with pytest.raises(DataError, match="no such file; --dataset takes"):
            read_rows(str(tmp_path / name))
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="UTF-8"):
        read_rows(str(tmp_path / "latin"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be loaded as a data set"):
        read_rows(str(tmp_path / "bad.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: cannot be loaded as a data set"):
        read_rows(str(tmp_path / "empty"))


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=5),
    st.booleans(),
)
def test_every_text_comes_back(tmp_path_factory, texts, escaped) -> None:
    """Also with the line ends that only Python knows, byte order marks and carriage returns."""
    file = tmp_path_factory.mktemp("rows") / "rows"
    lines = "\r\n".join(json.dumps({"prompt": text, "answer": text}, ensure_ascii=escaped) for text in texts)
    file.write_bytes(b"\xef\xbb\xbf" * escaped + lines.encode())
    assert read_rows(str(file)) == tuple(Row((("user", text),), text) for text in texts)


def test_the_three_shapes(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "be brief"), ("user", "why?"), ("assistant", "because"))]
    rows = [
        {"context": "a long story", "prompt": "who?", "answer": "she"},
        {"messages": turns},
        {"messages": turns[:2]},
        {"text": "once upon a time"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    asked = (("system", "be brief"), ("user", "why?"))
    assert read_rows(str(file)) == (
        Row((("user", "a long story\n\nwho?"),), "she", "a long story"),
        Row(asked, "because"),
        Row(asked),
        Row((("", "once upon a time"),)),
    )


def test_columns_by_other_names(tmp_path: Path) -> None:
    """In every kind of source the same rows."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "folder/train.jsonl")
    table.save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.parquet", "folder", "saved"):
        assert read_rows(str(tmp_path / name), columns=COLUMNS) == READ
    with pytest.raises(DataError, match=r"unknown key 'input'.*--columns takes other names"):
        read_rows(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="no column 'prompt', it has input, output, id; name its columns"):
        read_rows(str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match="no column 'inputs', it has input"):
        read_rows(str(tmp_path / "rows.parquet"), columns="prompt=inputs")


def test_a_table_s_nulls_are_not_given_and_other_columns_do_not_count(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": None, "id": 1}, {"prompt": "b", "answer": "c", "id": 2}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet")) == (Row((("user", "a"),)), Row((("user", "b"),), "c"))


@pytest.mark.parametrize("text", ["prompt", "promt=x", "prompt=", "=x", "prompt=a,prompt=b", "prompt=a,answer=a"])
def test_columns_that_cannot_be_meant(text) -> None:
    with pytest.raises(UsageError, match="--columns takes different OURS=THEIRS pairs"):
        parse_columns(text)


def folder_with_splits(place: Path) -> Path:
    (place / "data").mkdir(parents=True)
    for split in ("test", "validation"):
        lines = "\n".join(json.dumps({"text": f"{split} {i}"}) for i in range(2))
        (place / "data" / f"{split}.jsonl").write_text(lines)
    return place


def test_splits_of_a_folder(tmp_path: Path) -> None:
    folder = str(folder_with_splits(tmp_path / "two"))
    tests = tuple(Row((("", f"test {i}"),)) for i in range(2))
    assert read_rows(folder, split="test") == tests
    assert read_rows(f"{folder}:default/test") == tests
    assert read_rows(f"{folder}:default/test", config="default", split="test") == tests
    with pytest.raises(DataError, match="no split 'train', it has validation, test; name one with --dataset-split"):
        read_rows(folder)
    with pytest.raises(UsageError, match="--dataset says 'test' and --dataset-split says 'validation'"):
        read_rows(f"{folder}:default/test", split="validation")
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW)
    with pytest.raises(UsageError, match="are for hub ids and folders"):
        read_rows(str(file), split="test")


def test_a_hub_s_data_set_from_the_cache(tmp_path: Path) -> None:
    """What `load_dataset` left there while there was a network."""
    name = "made-up-org/long-texts"
    builder = datasets.load_dataset_builder(str(folder_with_splits(tmp_path / "long-texts")))
    builder.download_and_prepare()
    written = Path(builder.cache_dir)
    kept = tmp_path / "cache" / "made-up-org___long-texts" / "default" / "0.0.0" / ("a" * 40)
    kept.parent.mkdir(parents=True)
    shutil.copytree(written, kept)
    for file in kept.glob("*.arrow"):
        file.rename(kept / f"long-texts-{file.name.rpartition('-')[2]}")
    assert read_rows(f"{name}:default/validation")[0] == Row((("", "validation 0"),))
    assert read_rows(name, split="test")[0] == Row((("", "test 0"),))


def test_a_hub_s_data_set_without_a_network() -> None:
    with pytest.raises(DataError, match=r"made-up-org/none: cannot be loaded as a data set: .*without network, bring"):
        read_rows("made-up-org/none")


def test_large_tables_are_cut_and_it_is_said(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(hub, "MAX_ROWS", 3)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet"), columns=COLUMNS) == READ[:3]
    assert "the first 3 of 5 rows are used" in caplog.text


def test_calibration_and_validation_share_no_row() -> None:
    calibration, held_out = split_rows([*READ, *READ], "file")
    assert sorted(map(repr, calibration + held_out)) == sorted(map(repr, READ))
    assert len(held_out) == 1
    assert split_rows(READ[::-1], "file") == (calibration, held_out)
    with pytest.raises(DataError, match="file: one sample cannot both calibrate and validate"):
        split_rows(READ[:1] * 3, "file")


def test_no_name_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="--dataset is empty"):
        read_rows("")
