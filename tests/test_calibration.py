"""A job's texts: shortages and cuts said and recorded, the template applied and shown."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from moa.calibration import TextSource, summary
from moa.demo import language
from moa.demo.tokenizer import build_tokenizer
from moa.errors import DataError, UsageError
from moa.plan import Calibration
from moa.profile.chat import Chat
from moa.settings import CompressSettings

TEMPLATE = "{% for m in messages %} {{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %} then {% endif %}"


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def rows_file(folder: Path, lengths: list[int]) -> str:
    file = folder / "rows.jsonl"
    rows = [
        {"prompt": " ".join(language.KEYS[(i + j) % 128] for j in range(n)), "answer": "10 11"}
        for i, n in enumerate(lengths)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def settings_for(dataset: str, **changes: object) -> CompressSettings:
    return CompressSettings(
        dataset=dataset, lengths_tokens=(128, 256), num_samples=4, supervision="reference", **changes
    )


def test_what_was_cut_and_what_is_lacking_is_said_and_recorded(words, tmp_path: Path, caplog) -> None:
    settings = settings_for(rows_file(tmp_path, [100, 150, 300, 20]))
    source = TextSource.open(words, settings)
    rows = [*source.calibration_rows, *source.validation_rows]
    source = replace(source, calibration_rows=rows)
    with caplog.at_level("WARNING", logger="moa"):
        samples = {n: source.samples(n, 4, 0) for n in settings.lengths_tokens}
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 4 texts wanted are long enough for 128 tokens",
        f"2 of 3 texts were cut to fit 128 tokens, by {150 + 3 - 128 + 300 + 3 - 128} tokens in all",
        "2 of 4 texts wanted are long enough for 256 tokens",
        f"1 of 2 texts were cut to fit 256 tokens, by {300 + 3 - 256} tokens in all",
    ]
    record = source.record(samples)
    found = [
        (at.length_tokens, at.samples, at.wanted_samples, at.truncated_samples, at.truncated_tokens, at.answer_tokens)
        for at in record.lengths
    ]
    assert found == [(128, 3, 4, 2, 200, 6), (256, 2, 4, 1, 47, 4)]
    assert (record.samples_per_length, record.max_answer_tokens, record.chat_template_sha256) == (3, 32, "")
    said = summary(record)
    assert "3 texts of 4 wanted at 128 tokens, 2 cut by 200 tokens in all" in said
    assert "reference answers, no chat template" in said
    assert Calibration.model_validate_json(record.model_dump_json()) == record


def test_the_template_is_recorded_and_shown(words) -> None:
    words.chat_template = TEMPLATE
    settings = CompressSettings(lengths_tokens=(256,), num_samples=2)
    source = TextSource.open(words, settings)
    samples = source.samples(256, 2, 0)
    record = source.record({256: samples})
    assert record.chat_template_sha256 == Chat.of(words, "on").sha256
    assert "the chat template applied" in summary(record)
    assert "wanted" not in summary(record)
    shown = source.shown(samples[0])
    head, tail = shown.split(f" [... {256 - 80} tokens ...] ")
    assert words.decode(samples[0].token_ids).startswith(head)
    assert words.decode(samples[0].token_ids).endswith(tail)
    off = TextSource.open(words, replace(settings, chat_template="off"))
    assert off.record({256: samples}).chat_template_sha256 == ""
    assert off.samples(256, 2, 0) != samples


def test_mixed_lengths_fill_the_half_below_each_length_evenly(words) -> None:
    settings = CompressSettings(lengths_tokens=(256, 512), num_samples=9, mixed_lengths=True)
    source = TextSource.open(words, settings)
    samples = source.samples(512, 9, 0)
    lengths = sorted(len(sample.token_ids) for sample in samples)
    assert source.record({512: samples}).lengths[0].shortest_tokens == lengths[0]
    assert lengths[0] > 256
    assert lengths[-1] == 512
    assert max(b - a for a, b in pairwise(lengths)) < 80  # 9 even steps are of 28
    assert {len(sample.token_ids) for sample in source.samples(1024, 4, 1, validate=True)} == {1024}
    plain = TextSource.open(words, replace(settings, mixed_lengths=False))
    assert {len(sample.token_ids) for sample in plain.samples(512, 9, 0)} == {512}


def test_calibration_and_validation_take_different_rows(words, tmp_path: Path) -> None:
    source = TextSource.open(words, settings_for(rows_file(tmp_path, [200 + i for i in range(8)])))
    kept = {s.token_ids[1:50] for s in source.samples(256, 8, 0)}
    held = {s.token_ids[1:50] for s in source.samples(256, 8, 0, validate=True)}
    assert (len(kept), len(held)) == (6, 2)
    assert not kept & held


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("./rows.jsonl", "rows.jsonl"),
        ("{}/rows.jsonl", "rows.jsonl"),
        ("{}/table", "table"),
        ("{}/table:default/train", "table:default/train"),
        ("table:default", "table:default"),
    ],
)
def test_a_local_data_set_is_recorded_without_its_place(words, tmp_path: Path, monkeypatch, dataset, told) -> None:
    file = Path(rows_file(tmp_path, [200, 201, 202]))
    (tmp_path / "table").mkdir()
    (tmp_path / "table/train.jsonl").write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    source = TextSource.open(words, settings_for(dataset.format(tmp_path)))
    record = source.record({128: source.samples(128, 2, 0)})
    assert record.dataset == told
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record.dataset_file_sha256 == (digest if told.endswith(".jsonl") else "")


def test_references_must_be_there(words, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n} dog " * 60}) for n in "ab"))
    source = TextSource.open(words, settings_for(str(tmp_path / "rows.jsonl")))
    with pytest.raises(DataError, match="have no 'answer', which --supervision reference needs"):
        source.samples(128, 1, 0)


def test_a_record_of_before_still_loads() -> None:
    old = {
        "dataset": "synthetic", "dataset_sha256": "x", "samples_per_length": 2, "lengths_tokens": [128], "seed": 0,
        "estimator": "joint", "supervision": "model",
    }  # fmt: skip
    record = Calibration.model_validate_json(json.dumps(old))
    assert record.lengths == ()
    assert record.max_answer_tokens is None
    assert "no chat template." in summary(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": "prompt=x"}, "--columns says how to read a data set"),
        ({"dataset_split": "test"}, "--dataset-split says how to read a data set"),
        ({"dataset": "x", "columns": "bogus"}, "--columns takes"),
        ({"chat_template": "maybe"}, "--chat-template must be one of auto, on, off, got 'maybe'"),
        ({"max_answer_tokens": 0}, "--max-answer-tokens must be at least 1"),
        ({"max_answer_tokens": 100, "lengths_tokens": (128,)}, "must leave half of the shortest length"),
    ],
)
def test_data_options_that_cannot_be_meant(changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        CompressSettings(**changes)
