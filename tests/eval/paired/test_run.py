"""Dense beside a plan: the same samples, the scores that each alone would have, what is wrong said."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from contextlib import nullcontext
from functools import partialmethod

import pytest
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import moa
from moa.errors import DataError, MoaError, UsageError
from moa.eval.paired import tasks as tasks_module
from moa.eval.paired.markdown import to_markdown
from moa.eval.paired.report import from_json, to_json, write_outcome
from moa.eval.paired.run import Way, run_paired
from moa.eval.paired.settings import EvalSettings
from moa.eval.paired.tasks import load_tasks
from moa.eval.paired.view import View
from moa.eval.scoring import score

TASKS = ("moa_demo_multikey", "moa_demo_perplexity")
CHAT = "{% for m in messages %}<bos> question : {{ m['content'] }} . {% endfor %}"


@pytest.fixture
def loaded(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)


def settings(folder, **given):
    return EvalSettings(str(folder), **{"tasks": TASKS, "lengths_tokens": (200, 300), "num_samples": 3, **given})


def evaluate(loaded, folder, ways=(), **given):
    wanted = settings(folder, **given)
    return run_paired(*loaded, load_tasks(wanted, str(folder)), wanted, ways)


@pytest.fixture
def outcome(loaded, tiny_folder, tiny_plan):
    return evaluate(loaded, tiny_folder, [Way.under(tiny_plan)])


def test_every_score_is_what_the_model_alone_gives(outcome, loaded, tiny_folder, tiny_plan):
    model, tokenizer = loaded
    wanted = settings(tiny_folder)
    task = load_tasks(wanted, str(tiny_folder)).tasks["moa_demo_perplexity"]
    for variant in ("dense", "moa"):
        with moa.apply(model, tiny_plan) if variant == "moa" else nullcontext():
            for length in (200, 300):
                scores = outcome.report.at(variant, ("moa_demo_perplexity", length, "nll"))
                for sample in scores.samples:
                    doc = task.eval_docs[sample.doc_id]
                    ids = tokenizer(doc["input"] + doc["target"])["input_ids"]
                    losses = score(model, ids, range(len(ids) - doc["tokens"], len(ids)))[1]
                    assert sample.score == pytest.approx(float(losses.mean()), abs=1e-4)
    assert not hasattr(model, "moa")  # left as it was


def test_the_report_pairs_all_samples(outcome, tiny_plan):
    report = outcome.report
    assert [variant.name for variant in report.variants] == ["dense", "moa"]
    assert report.variants[1].plan.sha256 == tiny_plan.sha256
    assert [variant.attention for variant in report.variants] == ["sdpa", "torch"]
    assert [(d.task, d.length_tokens, d.samples, d.unpaired) for d in report.differences] == [
        (task, length, 3, 0) for task in TASKS for length in (200, 300)
    ]
    assert (report.truncated, report.unpaired, report.problems()) == (0, 0, ())
    c = report.conditions
    assert (c.max_length_tokens, c.context_tokens, c.chat_template_sha256, c.processes) == (300, 2048, "", 1)
    assert {"lm_eval", "torch", "moa"} <= {*c.versions}
    assert all(sample.depth_ratio is not None for sample in report.at("moa", report.cells[0]).samples)


def test_every_variant_tells_its_kv_bytes(outcome, loaded, tiny_plan):
    dense, ours = outcome.report.variants
    assert [size.length_tokens for size in dense.kv] == [200, 300]
    assert [size.ratio for size in dense.kv] == [1, 1]
    assert [size.kv_bytes for size in ours.kv] == [tiny_plan.kv_bytes(n) for n in (200, 300)]
    assert [size.dense_kv_bytes for size in ours.kv] == [size.kv_bytes for size in dense.kv]
    assert dense.saves_memory
    assert ours.saves_memory
    assert not Way.under(tiny_plan, backend="reference").kv(loaded[0], (200,)).saves_memory
    assert "12.50 KiB (25 %)" in (text := to_markdown(View(outcome.report)))
    assert "18.75 KiB (25 %)" in text
    hidden = ours.model_copy(update={"saves_memory": False})
    text = to_markdown(View(outcome.report.model_copy(update={"variants": (dense, hidden)})))
    assert "accuracy only: keys are hidden, memory holds them all" in text
    assert "50.00 KiB (sees 25 %)" in text
    assert "12.50 KiB" not in text


def test_unequal_bytes_are_told(outcome):
    dense, ours = outcome.report.variants
    near, far = (
        ours.model_copy(
            update={
                "name": name,
                "equal_to": "moa",
                "kv": tuple(s.model_copy(update={"kv_bytes": int(s.kv_bytes * (1 + by))}) for s in ours.kv),
            }
        )
        for name, by in (("near", -0.019), ("far", 0.03))
    )
    told = outcome.report.model_copy(update={"variants": (dense, ours, near, far)}).problems()
    assert [problem for problem in told if "bytes" in problem] == [
        f"far is not at equal KV bytes: +3.0% beside moa at {n} tokens" for n in (200, 300)
    ]


def test_a_dense_plan_differs_in_nothing(loaded, tiny_folder, tiny_plan):
    dense = tiny_plan.model_validate({"model": tiny_plan.model, "rules": (((0, 1.0),) * 2,) * 2})
    report = evaluate(loaded, tiny_folder, [Way.under(dense)]).report
    for found in report.differences:
        assert found.difference == pytest.approx(0, abs=1e-5)
        assert found.low <= 0 <= found.high


def test_files_are_lm_evals_and_ours(outcome, tmp_path):
    report = write_outcome(outcome, tmp_path, log_samples=True)
    for variant in report.variants:
        results = json.loads((tmp_path / variant.results_file).read_text())
        assert results["results"]["moa_demo_multikey"]["200,none"] == report.at(variant.name, report.cells[0]).mean
        assert results["config"]["moa"]["plan_sha256"] == (variant.plan.sha256 if variant.plan else None)
        assert {*results["task_hashes"]} == {*TASKS}
        (samples,) = (tmp_path / variant.results_file).parent.glob("samples_moa_demo_multikey_*.jsonl")
        row = json.loads(samples.read_text().splitlines()[0])
        assert {"doc", "target", "resps", "arguments", "doc_hash", "prompt_hash"} <= {*row}
    content = json.loads((tmp_path / "eval.json").read_text())
    assert from_json(content) == report
    assert content == to_json(report)
    text = (tmp_path / "eval.md").read_text()
    assert "## 200 tokens" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {*re.findall(r"\]\((\w+\.png)\)", text)} != set()
    for written in (text, (tmp_path / "eval.html").read_text()):
        assert report.variants[1].plan.sha256[:12] in written
        assert str(tmp_path) not in written


def test_every_condition_is_told(outcome):
    """What a number depends on: model, task, seeds, versions, and where and how it was run."""
    c = outcome.report.conditions
    told = {name for name, value in c.model_dump().items() if value not in ("", None, {}, 0, 0.0)}
    left_out = {
        "model_commit",
        "chat_template",
        "chat_template_sha256",
        "limit",
        "options",
        "smoke_test",
        "prefill_chunk_tokens",
    }  # have none here
    assert told == {*type(c).model_fields} - left_out - {"beyond_context_tokens", "template_tokens"}
    assert (c.truncation_side, c.model_revision) == ("left", "main")
    assert {*c.seeds} == {f"{name}_seed" for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    assert all(task.version and len(task.samples_hash) == 64 for task in outcome.report.tasks)
    for name, variant in zip(("dense", "moa"), outcome.report.variants, strict=True):
        config = outcome.results[name]["config"]
        assert config["moa"]["model_fingerprint"] == c.model_fingerprint
        assert (config["moa"]["device"], config["moa"]["truncated_requests"]) == ("cpu", 0)
        assert (config["random_seed"], config["fewshot_random_seed"]) == (0, 1234)
        assert outcome.results[name]["versions"] == dict.fromkeys(TASKS, 1)
        assert variant.attention == config["moa"]["attention"]


def test_without_a_plan_it_is_unpaired(loaded, tiny_folder):
    report = evaluate(loaded, tiny_folder).report
    assert report.differences == ()
    assert report.problems() == ("unpaired: there is no plan beside the dense model",)
    assert "**Unpaired" in to_markdown(View(report))


def test_cut_samples_are_counted(loaded, tiny_folder, tiny_plan):
    report = evaluate(loaded, tiny_folder, [Way.under(tiny_plan)], max_length_tokens=250).report
    assert report.truncated == 2 * 2 * 3  # two variants, two tasks, three samples of 300 tokens
    assert report.problems() == ("12 samples were truncated to 250 tokens",)
    assert {f.length_tokens: f.truncated for f in report.scores} == {200: 0, 300: 3}


def test_texts_beyond_the_context_are_told(loaded, tiny_folder, tiny_plan):
    loaded[0].config.max_position_embeddings = 256
    report = evaluate(loaded, tiny_folder, [Way.under(tiny_plan, allow_other_weights=True)]).report
    assert report.problems() == ("texts go 44 tokens beyond the model's 256",)


def test_a_limit_is_a_smoke_test(loaded, tiny_folder, tiny_plan):
    report = evaluate(loaded, tiny_folder, [Way.under(tiny_plan)], limit=2).report
    assert report.problems() == ("smoke test: --limit leaves out samples, no number counts",)
    assert [(task.samples_original, task.samples_used) for task in report.tasks] == [(6, 2), (6, 2)]


def test_other_prompts_are_no_partners(outcome):
    report = outcome.report
    changed = report.scores[0].model_copy(
        update={"samples": tuple(s.model_copy(update={"prompt": "0"}) for s in report.scores[0].samples)}
    )
    other = report.model_copy(update={"scores": (changed, *report.scores[1:])})
    assert other.unpaired == 6
    assert other.problems() == ("6 samples have no partner with the same prompt",)


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_the_chat_template_is_applied_and_has_room(wanted, loaded, tiny_folder, tiny_plan):
    model, tokenizer = loaded
    tokenizer.chat_template = CHAT
    outcome = evaluate((model, tokenizer), tiny_folder, [Way.under(tiny_plan)], chat_template=wanted)
    report = outcome.report
    c = report.conditions
    assert c.chat_template == (CHAT if wanted == "auto" else "")
    assert c.chat_template_sha256 == (hashlib.sha256(CHAT.encode()).hexdigest() if wanted == "auto" else "")
    assert outcome.results["moa"]["chat_template"] == (CHAT if wanted == "auto" else None)
    assert c.max_length_tokens == 300 + c.template_tokens
    assert (c.template_tokens > 0, report.truncated) == (wanted == "auto", 0)


def test_ways_need_names_of_their_own(loaded, tiny_folder, tiny_plan):
    with pytest.raises(UsageError, match="names of their own"):
        evaluate(loaded, tiny_folder, [Way.under(tiny_plan), Way.under(tiny_plan)])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tasks": ("moa_demo_multiky",)}, "did you mean 'moa_demo_multikey'"),
        ({"tasks": ()}, "--tasks"),
        ({"lengths_tokens": (0,)}, "--lengths"),
        ({"num_samples": 0}, "--num-samples"),
        ({"limit": 0.0}, "--limit"),
        ({"batch_size": "auto:x"}, "--batch-size"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, match, tiny_folder, monkeypatch):
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    with pytest.raises(UsageError, match=match):
        load_tasks(settings(tiny_folder, **given), str(tiny_folder))


HUB_TASK = """
task: hub_task
dataset_path: organisation/data
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def more_tasks(tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "hub.yaml").write_text(HUB_TASK)
    (folder / "needy.yaml").write_text(
        "task: needy\ncustom_dataset: !function needs.data\n" + HUB_TASK.split("hub_task\n")[1]
    )
    (folder / "needs.py").write_text("import jieba\n")
    return str(folder)


def test_missing_data_says_what_to_fetch(tiny_folder, more_tasks):
    with pytest.raises(
        DataError, match=r"hub_task: its data cannot be had: .*moa eval prefetch MODEL --tasks hub_task"
    ):
        load_tasks(settings(tiny_folder, tasks=("hub_task",), include_path=more_tasks), str(tiny_folder))


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known(tiny_folder):
    """That its data is not here is all that is wrong with this one."""
    with pytest.raises(DataError, match=r"babilong_qa1: .*(offline|reach|connect|cache).*moa eval prefetch"):
        load_tasks(settings(tiny_folder, tasks=("babilong_qa1",)), str(tiny_folder))


def test_missing_packages_say_how_to_install_them(tiny_folder, more_tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)  # as where it is not installed
    with pytest.raises(MoaError, match=r"needy: .*jieba.*pip install 'lm_eval\[longbench\]'"):
        load_tasks(settings(tiny_folder, tasks=("needy",), include_path=more_tasks), str(tiny_folder))


def test_patterns_and_tags_name_several_tasks(tiny_folder):
    wanted = settings(tiny_folder, tasks=("moa_demo_s*", "moa_demo"), lengths_tokens=(256,), num_samples=1)
    loaded = load_tasks(wanted, str(tiny_folder))
    assert {*loaded.tasks} == {
        f"moa_demo_{name}" for name in ("single", "multikey", "multivalue", "chain", "perplexity")
    }
    assert (loaded.answer_tokens, loaded.fewest_samples) == (0, 1)
    assert tasks_module.EXTRAS["jieba"] == "longbench"
