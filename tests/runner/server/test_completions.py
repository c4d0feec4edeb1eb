"""/v1/completions: every form of a prompt, echo, log-probabilities, streams."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from moa.hf import apply
from moa.hf.load import load_model

WORDS = "boris came to the harbour and nadia left the old castle . the dog follows anna ."


def parts_of(answer) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def reference(tiny_folder, served, tokenizer):
    """Greedy tokens, and log-probabilities of all of a text, of the model under the same plan alone."""
    model = load_model(str(tiny_folder))
    with apply(model, served.service.plan), torch.no_grad():
        prompt = torch.tensor([tokenizer(WORDS)["input_ids"]])
        tokens = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        logprobs = model(tokens).logits.log_softmax(-1)[0]  # [N, V]
    return prompt[0].tolist(), tokens[0, prompt.shape[1] :].tolist(), logprobs


def test_a_text_goes_on_as_the_model_alone_does(served, reference, tokenizer):
    prompt, tokens, _ = reference
    answer = served.complete(max_tokens=12)
    assert tokens != prompt[-len(tokens) :]
    assert answer["choices"][0]["text"].split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == len(tokens)
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_every_form_of_a_prompt_gives_the_same(served, tokenizer):
    ids = tokenizer(WORDS)["input_ids"]
    texts = [
        [choice["text"] for choice in served.complete(prompt, max_tokens=6)["choices"]]
        for prompt in (WORDS, ids, [WORDS], [ids], [WORDS, ids])
    ]
    assert [len(each) for each in texts] == [1, 1, 1, 1, 2]
    assert len({text for each in texts for text in each}) == 1


def test_special_tokens_are_added_unless_they_are_not_wanted(served, tokenizer):
    ids = tokenizer(WORDS)["input_ids"]
    bare = served.complete(WORDS, max_tokens=1, add_special_tokens=False)
    assert bare["usage"]["prompt_tokens"] == len(ids) - 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_an_echo_tells_the_log_probability_of_every_token(served, reference, max_tokens, stream):
    prompt, tokens, logprobs = reference
    fields = {"max_tokens": max_tokens, "logprobs": 2, "echo": True, "stream": stream, "temperature": 0}
    answer = served.post("/v1/completions", {"prompt": prompt, **fields})
    choices = [part["choices"][0] for part in parts_of(answer)] if stream else answer.json()["choices"]
    told = {name: [each for c in choices for each in c["logprobs"][name]] for name in choices[0]["logprobs"]}
    whole = prompt + tokens[:max_tokens]
    wanted = [logprobs[i, token].item() for i, token in enumerate(whole[1:])]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    for i, top in enumerate(told["top_logprobs"][1:]):
        assert len(top) in (2, 3)
        assert max(top.values()) == pytest.approx(logprobs[i].max().item(), abs=1e-4)
        assert told["token_logprobs"][i + 1] in top.values()
    read = [
        word for word in "".join(told["tokens"]).split() if not word.startswith("<")
    ]  # special tokens are not shown
    assert read == "".join(c["text"] for c in choices).split()
    assert told["text_offset"] == sorted(told["text_offset"])


def test_a_stream_says_what_the_whole_says(served):
    fields = {"prompt": [WORDS, "the castle"], "n": 2, "max_tokens": 9, "temperature": 1, "seed": 5, "logprobs": 1}
    whole = served.post("/v1/completions", fields).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = parts_of(served.post("/v1/completions", {**fields, **options}))
    assert parts[-1]["choices"] == []
    usage = {**parts[-1]["usage"], "prompt_tokens_details": whole["usage"]["prompt_tokens_details"]}
    assert usage == whole["usage"]
    assert len({part["id"] for part in parts}) == 1
    for choice in whole["choices"]:
        own = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [each for c in own for each in c["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
    texts = [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) > 2, "the seeds change nothing"


def test_usage_can_come_with_every_part(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"prompt": WORDS, "max_tokens": 4, "temperature": 0, "stream": True, "stream_options": options}
    parts = parts_of(served.post("/v1/completions", fields))
    told = [part["usage"]["completion_tokens"] for part in parts]
    assert told == sorted(told)  # several tokens may come together
    assert told[-2:] == [4, 4]


def test_a_stop_string_ends_the_text_before_it(served):
    text = served.complete(max_tokens=12)["choices"][0]["text"]
    word = text.split()[3]
    choice = served.complete(max_tokens=12, stop=word)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text[: text.index(word)]


def test_sampling_fields_reach_the_engine(served, tokenizer):
    ids = tokenizer(WORDS)["input_ids"]
    token = tokenizer.convert_tokens_to_ids("castle")
    biased = served.complete(ids, max_tokens=3, logit_bias={str(token): 100})
    assert biased["choices"][0]["text"].split() == ["castle"] * 3
    penalised = served.complete(ids, max_tokens=8, logit_bias={str(token): 20}, frequency_penalty=2, presence_penalty=2)
    assert penalised["choices"][0]["text"] != biased["choices"][0]["text"]
    free = {"temperature": 2, "max_tokens": 16, "seed": 1, "n": 4, "ignore_eos": True}
    loose, tight = (served.complete(ids, **free, top_k=k)["choices"] for k in (-1, 1))
    assert len({choice["text"] for choice in loose}) == 4
    assert len({choice["text"] for choice in tight}) == 1


def test_null_stands_for_the_default(served):
    names = (
        "n temperature top_p top_k min_p stop seed logprobs echo stream stream_options logit_bias best_of suffix user"
    )
    answer = served.post("/v1/completions", {"prompt": WORDS, **dict.fromkeys(names.split())})
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] <= 16


def test_prompts_are_not_logged(served, caplog):
    with caplog.at_level("DEBUG"):
        served.complete("nadia 8712 \x1b[31m\nERROR", max_tokens=2, echo=True)
        served.post("/v1/completions", {"prompt": "nadia 8712", "nothing": 1})
    assert caplog.records
    assert not any("8712" in record.getMessage() or "\x1b" in record.getMessage() for record in caplog.records)


def test_prompts_of_a_list_are_queued_at_once(serve, monkeypatch, wait_for):
    """They reach the engine between the same two steps, while one goes on."""
    server, held, goes_on = serve(), threading.Event(), threading.Event()
    served = server.service.served
    step = served.engine.step
    monkeypatch.setattr(served.engine, "step", lambda: (held.set(), goes_on.wait(60), step())[2])
    answers: list[dict] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: answers.append(server.complete(prompt, max_tokens=1)))
        for prompt in ("the castle", ["the castle"] * 16)
    ]
    threads[0].start()
    try:
        assert held.wait(60)
        threads[1].start()
        wait_for(lambda: len(served._commands) == 16)
    finally:
        goes_on.set()
        for thread in threads:
            if thread.ident:
                thread.join(60)
    assert sorted(len(answer["choices"]) for answer in answers) == [1, 16]


def test_one_refused_prompt_ends_the_others(serve, wait_for):
    server = serve()
    room = server.service.longest_tokens
    prompts = [[5, 6], [5] * room, [5, 7]]
    answer = server.post("/v1/completions", {"prompt": prompts, "max_tokens": room - 2, "ignore_eos": True})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    server.wait_idle()
    wait_for(lambda: server.service.served.stats.finished == {"cancelled": 2})


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_counted_once_for_each_prompt(serve, stream):
    server = serve()
    prompts = [[5 + i % 50 for i in range(130)], [6 + i % 50 for i in range(130)]]
    for prompt in 2 * prompts:  # the second time the state at the last block that both share is kept
        server.complete(prompt, max_tokens=1)
    cached = [_cached(server, [prompt]) for prompt in prompts]
    assert all(cached)
    assert _cached(server, prompts, n=3, stream=stream) == sum(cached)


def _cached(server, prompts, *, stream: bool = False, **fields) -> int:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    asked = {"prompt": prompts, "max_tokens": 1, "temperature": 0, **fields, **options}
    answer = server.post("/v1/completions", asked)
    told = parts_of(answer)[-1] if stream else answer.json()
    return told["usage"]["prompt_tokens_details"]["cached_tokens"]
