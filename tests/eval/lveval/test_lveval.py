"""LV-Eval's tasks: files as it publishes them, read, run through lm-eval beside a plan, and scored by its definition."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.errors import DataError, MoaError, UsageError
from moa.eval.harness import TASKS_FOLDER
from moa.eval.lveval.data import samples
from moa.eval.lveval.lm_eval_task import make_dataset, scored
from moa.eval.lveval.metrics import score
from moa.eval.lveval.subsets import LEVELS, SUBSETS
from moa.eval.paired.run import Way, run_paired
from moa.eval.paired.settings import EvalSettings
from moa.eval.paired.tasks import load_tasks
from moa.hf.shape import model_shape
from moa.plan import Plan

Publish = Callable[..., Path]
CHINESE = {"input": "安娜住在哪里？", "context": "安娜住在北京。", "answers": ["北京"], "answer_keywords": None}


class Loose(yaml.SafeLoader):
    """Takes lm-eval's `!function` for a text."""


Loose.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_there_is_a_task_for_every_data_set_and_level() -> None:
    folder = TASKS_FOLDER / "lveval"
    found = {path.stem: yaml.load(path.read_text(), Loose) for path in folder.glob("*.yaml")}
    assert found == {
        f"{name}_{level}": {
            "include": "_lveval_yaml",
            "task": f"moa_lveval_{name}_{level}",
            "tag": ["moa_lveval", f"moa_lveval_{level}"],
            "dataset_kwargs": {"subset": name, "level": level},
            "generation_kwargs": {"do_sample": False, "max_gen_toks": subset.answer_tokens, "until": []},
        }
        for name, subset in SUBSETS.items()
        for level in LEVELS
    }


@pytest.mark.parametrize("unpacked", [None, ".", "factrecall_en"])
def test_files_are_read_as_they_are_published(publish: Publish, unpacked: str | None) -> None:
    """In the zip, or unpacked beside it, or in the folder that unpacking makes."""
    folder = publish("factrecall_en")
    if unpacked:
        with zipfile.ZipFile(folder / "factrecall_en.zip") as archive:
            data = archive.read("factrecall_en/factrecall_en_16k.jsonl")
        (folder / "factrecall_en.zip").unlink()
        (folder / unpacked).mkdir(exist_ok=True)
        (folder / unpacked / "factrecall_en_16k.jsonl").write_bytes(data)
    rows = [*samples("factrecall_en", "16k", folder)]
    assert [row["answers"] for row in rows] == [["Paris"], ["the cart", "Bert"]]
    data = make_dataset(subset="factrecall_en", level="16k", data_folder=str(folder), max_seq_lengths=[4096])["test"]
    assert data["prompt"][0] == (
        "Please answer the following questions based on the given article.\n\n"
        "Article: Anna lives in Paris. {Bert} lives in Rome.\n\n"
        "Please answer the following questions based on the above article.\n\n"
        "Question: Where does Anna live?\nAnswer:"
    )
    assert scored(data[1], ["It is Bert."]) == {"score": 0}, "the first of the right answers is the one that counts"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (b"{", r"x\.zip: \w+_16k\.jsonl, line 1: not JSON"),
        (b'{"input": "a", "context": "b", "answers": []}', "line 1: wanted an object with texts"),
        (b'\n{"input": 1, "context": "b", "answers": ["c"]}', "line 2: wanted an object with texts"),
        (b'{"input": "a", "context": "b", "answers": ["c"], "answer_keywords": 3}', "line 1: answer_keywords"),
        (b"\xff", "not a file that LV-Eval publishes"),
        (b"", "factrecall_en_16k has no samples"),
    ],
)
def test_other_files_say_what_is_wrong(rows: bytes, match: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "factrecall_en.zip", "w") as archive:
        archive.writestr("factrecall_en_16k.jsonl", rows)
    with pytest.raises(DataError, match=match.replace("x\\.zip", "factrecall_en\\.zip")):
        make_dataset(subset="factrecall_en", level="16k", data_folder=str(tmp_path))


def test_what_is_not_there_is_named(publish: Publish, tmp_path: Path) -> None:
    folder = publish("factrecall_en", "32k")
    with pytest.raises(DataError, match=r"factrecall_en\.zip: holds no factrecall_en_16k\.jsonl"):
        make_dataset(subset="factrecall_en", level="16k", data_folder=str(folder))
    with pytest.raises(DataError, match=r"has neither lic_mixup_16k\.jsonl nor lic_mixup\.zip"):
        make_dataset(subset="lic_mixup", level="16k", data_folder=str(folder))
    (tmp_path / "lic_mixup.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"lic_mixup\.zip: not a file that LV-Eval publishes"):
        make_dataset(subset="lic_mixup", level="16k", data_folder=str(tmp_path))
    with pytest.raises(
        DataError, match=r"Infinigence/LVEval: lic_mixup\.zip is not in the hub's cache, .* --data-folder"
    ):
        make_dataset(subset="lic_mixup", level="16k")
    with pytest.raises(UsageError, match="did you mean 'lic_mixup'"):
        make_dataset(subset="lic_mixpu", level="16k")
    with pytest.raises(UsageError, match="no level '16K'; did you mean '16k'"):
        make_dataset(subset="lic_mixup", level="16K")


def test_beside_a_plan_answers_are_scored_as_defined(publish: Publish, english_folder: Path, tmp_path: Path) -> None:
    """In both languages; scores are those of what was written, the room is the model's, and nothing was cut."""
    folder = publish("multifieldqa_en_mixup")
    publish("cmrc_mixup", rows=[CHINESE])
    names = ("moa_lveval_multifieldqa_en_mixup_16k", "moa_lveval_cmrc_mixup_16k")
    wanted = EvalSettings(str(english_folder), names, options={"data_folder": str(folder)}, batch_size="2")
    model = AutoModelForCausalLM.from_pretrained(english_folder).eval()
    plan = Plan.uniform(model_shape(model), 0, 0.25, sink_tokens=4, min_span_tokens=16)
    tasks = load_tasks(wanted, str(english_folder))
    tokenizer = AutoTokenizer.from_pretrained(english_folder)
    outcome = run_paired(model, tokenizer, tasks, wanted, [Way.under(plan)])
    report = outcome.report
    assert report.problems() == ()
    assert report.conditions.max_length_tokens == 4096
    assert report.conditions.options == {"data_folder": "published"}
    assert [(d.task, d.length_tokens, d.samples) for d in report.differences] == [
        (n, None, c) for n, c in zip(names, (2, 1), strict=True)
    ]
    for name in names:
        for sample in outcome.results["moa"]["samples"][name]:
            (written,), doc = sample["resps"][0], sample["doc"]
            assert sample["arguments"][0][1]["max_gen_toks"] == 64
            assert sample["score"] == score(SUBSETS[doc["subset"]], written, doc["answers"][0], doc["answer_keywords"])


def test_texts_that_do_not_fit_are_counted(publish: Publish, english_folder: Path) -> None:
    folder = publish("factrecall_en", rows=[{"input": "a", "context": "Anna lives. " * 2000, "answers": ["b"]}])
    wanted = EvalSettings(str(english_folder), ("moa_lveval_factrecall_en_16k",), options={"data_folder": str(folder)})
    model = AutoModelForCausalLM.from_pretrained(english_folder).eval()
    tasks = load_tasks(wanted, str(english_folder))
    report = run_paired(model, AutoTokenizer.from_pretrained(english_folder), tasks, wanted, []).report
    assert "1 samples were truncated to 4096 tokens" in report.problems()


def test_beside_made_up_tasks_room_and_context_are_those_of_both(publish: Publish, english_folder: Path) -> None:
    """The longer of the model's context and what the lengths need; longer texts than the context are told."""
    folder = publish("factrecall_en")
    model = AutoModelForCausalLM.from_pretrained(english_folder).eval()
    names = ("moa_lveval_factrecall_en_16k", "moa_passkey")
    for length, room, beyond in ((300, 4096, 0), (5000, 5016, 904)):
        options = {"data_folder": str(folder)}
        wanted = EvalSettings(str(english_folder), names, (length,), num_samples=1, options=options, limit=1)
        tasks = load_tasks(wanted, str(english_folder))
        c = run_paired(model, AutoTokenizer.from_pretrained(english_folder), tasks, wanted, []).report.conditions
        assert (c.max_length_tokens, c.beyond_context_tokens) == (room, beyond)


def test_a_missing_package_says_how_to_install_it(publish: Publish, english_folder: Path, monkeypatch) -> None:
    folder = publish("cmrc_mixup", rows=[CHINESE])
    monkeypatch.setitem(sys.modules, "jieba", None)
    from moa.eval.lveval import metrics

    metrics._jieba.cache_clear()
    names = ("moa_lveval_cmrc_mixup_16k",)
    wanted = EvalSettings(str(english_folder), names, options={"data_folder": str(folder)})
    with pytest.raises(MoaError, match=r"cmrc_mixup_16k: .*jieba.*pip install 'lm_eval\[longbench\]'"):
        load_tasks(wanted, str(english_folder))
