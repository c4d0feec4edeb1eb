"""The tasks as lm-eval runs them: prompts are whole, also in a chat, and scores are those of what was written."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.errors import UsageError
from moa.eval.longtext.lm_eval_task import make_dataset, perplexity
from moa.eval.paired.run import Way, run_paired
from moa.eval.paired.settings import EvalSettings
from moa.eval.paired.tasks import load_tasks
from moa.hf.shape import model_shape
from moa.plan import Plan

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TASKS = ("moa_niah_single_1", "moa_vt", "moa_qa_1", "moa_passkey", "moa_perplexity")


@pytest.mark.parametrize("template", ["", CHAT])
def test_no_prompt_is_cut_and_all_samples_pair(template, english_folder):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(english_folder),
        AutoTokenizer.from_pretrained(english_folder),
    )
    tokenizer.chat_template = template or None
    wanted = EvalSettings(str(english_folder), TASKS, (1300, 1600), num_samples=1, batch_size="2")
    tasks = load_tasks(wanted, str(english_folder))
    plan = Plan.uniform(model_shape(model), 0, 0.5, sink_tokens=4, min_span_tokens=16)
    outcome = run_paired(model, tokenizer, tasks, wanted, [Way.under(plan)])
    report = outcome.report
    assert report.problems() == ()
    assert report.conditions.max_length_tokens == 1600 + 128 + report.conditions.template_tokens
    assert bool(report.conditions.template_tokens) is bool(template)
    assert {(d.task, d.length_tokens) for d in report.differences} == {
        (task, n) for task in TASKS for n in (1300, 1600)
    }
    (prompt, _), doc = _first(outcome, "moa_passkey")
    assert prompt.endswith(doc["gen_prefix"])
    longest = max(len(tokenizer(prompt)["input_ids"]) for task in TASKS[:4] for prompt, _ in _prompts(outcome, task))
    assert longest > 1400


def _prompts(outcome, task):
    return [sample["arguments"][0] for sample in outcome.results["dense"]["samples"][task]]


def _first(outcome, task):
    sample = outcome.results["dense"]["samples"][task][0]
    return sample["arguments"][0], sample["doc"]


def test_data_at_every_length(english_folder, cache):
    data = make_dataset(
        family="passkey", pretrained=str(english_folder), max_seq_lengths=[300, 400], num_samples=2, version=1, plan="x"
    )["test"]
    assert data["max_length"] == [300, 300, 400, 400]
    again = make_dataset(family="passkey", tokenizer=str(english_folder), max_seq_lengths="300", num_samples="2")[
        "test"
    ]
    assert [*again] == [*data][:2]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"pretrained": None}, "tokenizer"),
        ({"max_seq_lengths": [0]}, "max_seq_lengths"),
        ({"num_samples": "many"}, "num_samples"),
        ({"data_seed": -1}, "data_seed"),
        ({"family": "nothing"}, "nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, match, english_folder):
    with pytest.raises(UsageError, match=match):
        make_dataset(**{"family": "passkey", "pretrained": str(english_folder), "max_seq_lengths": [300], **given})


def test_perplexity_of_losses():
    assert perplexity([1.0, 3.0]) == pytest.approx(7.389, abs=1e-3)
    assert perplexity([1e9]) > 1e300
