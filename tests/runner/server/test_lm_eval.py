"""lm-eval's `local-completions` against a server, and lm-eval on the model itself: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moa.cli.app import run
from moa.demo import MODEL_FOLDER
from moa.plan import load_plan

pytestmark = pytest.mark.usefixtures("quick_lm_eval")
SIZES = {"max_seq_lengths": [256, 512], "num_samples": 2, "tokenizer": "demo"}
GENERATE = """
task: goes_on
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {max_gen_toks: 12, until: ["."], temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TEXTS = ("boris came to the", "nadia left the old", "the dog follows")


def results_of(folder: Path, tasks: Path, model: str, arguments: str) -> dict[str, list]:
    """What a model said to each sample of each task."""
    words = [
        "run",
        "--model",
        model,
        "--model_args",
        arguments,
        "--tasks",
        "moa_demo_single,moa_demo_perplexity,goes_on",
    ]
    words += ["--metadata", json.dumps(SIZES), "--include_path", str(tasks), "--output_path", str(folder)]
    assert run(["lm-eval", *words, "--log_samples"]) == 0
    said = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        said[path.name.rpartition("_")[0]] = [
            row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])
        ]
    return said


@pytest.mark.parametrize("planned", [False, True])
def test_local_completions_says_what_the_model_says(serve_demo, tmp_path, planned):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "goes_on.yaml").write_text(GENERATE.replace("FILE", str(data)))
    url = serve_demo(load_plan(MODEL_FOLDER) if planned else None).url
    served = f"model=demo,base_url={url}/v1/completions,tokenizer={MODEL_FOLDER},num_concurrent=4,max_length=4096"
    local = "pretrained=demo" + (f",plan={MODEL_FOLDER}" if planned else "")
    ours = results_of(tmp_path / "served", tmp_path, "local-completions", served + ",add_bos_token=True")
    theirs = results_of(tmp_path / "local", tmp_path, "moa", local)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3
    for task, answers in theirs.items():
        for got, wanted in zip(ours[task], answers, strict=True):
            if task.endswith("goes_on"):
                assert got[0].split() == wanted[0].split()
            else:
                assert float(got[0][0]) == pytest.approx(float(wanted[0][0]), abs=2e-3)
                assert str(got[0][1]) == str(wanted[0][1])
