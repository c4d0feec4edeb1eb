"""The files of a report: all that was measured is kept, whatever becomes of pictures and pages."""

from __future__ import annotations

import json

import pytest

from moa.eval.paired import report as module
from moa.eval.paired.report import from_json, to_json, write_report
from moa.eval.paired.view import View


def test_what_was_measured_is_written_before_anything_is_drawn(made_up, tmp_path, monkeypatch):
    def fail(view):
        raise RuntimeError("no picture")

    monkeypatch.setattr(module, "pictures", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        write_report(made_up(), tmp_path)
    assert from_json(json.loads((tmp_path / "eval.json").read_text())) == made_up()


def test_json_tells_means_and_depths_of_all(made_up):
    view = View(made_up())
    content = to_json(view.report)
    assert len(content["means"]) == len(view.report.variants) * len(view.lengths)
    assert len(content["depths"]) == len(view.report.variants) * len(view.with_depth)
    for told in content["means"]:
        variant = next(v for v in view.report.variants if v.name == told["variant"])
        assert told["value"] == view.mean(variant, told["length_tokens"]).value
        assert (told["difference"] is None) is (variant is view.dense)
    for told in content["depths"]:
        assert sum(part["samples"] for part in told["depths"]) == 20


def test_a_page_lies_beside_its_pictures(made_up, tmp_path):
    write_report(made_up(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "eval.json", "eval.md", "eval.html", "accuracy_by_kv_bytes.png", "loss_by_kv_bytes_1.png", "accuracy_by_depth.png",
        "accuracy_by_depth_and_task.png",
    }  # fmt: skip
