"""/v1/chat/completions: the model's own template, and nothing that a client could put in its place."""

from __future__ import annotations

import json

import pytest

MESSAGES = [{"role": "system", "content": "boris"}, {"role": "user", "content": "came to the harbour"}]
WRITTEN = "<bos> <unk> boris . <unk> came to the harbour . the"


def ask(served, messages=MESSAGES, **fields):
    return served.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 8, **fields})


def parts_of(answer) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_chat_is_the_template_gone_on_with(served):
    answer = ask(served).json()
    plain = served.complete(WRITTEN, max_tokens=8, add_special_tokens=False)
    assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_a_stream_says_what_the_whole_says(served):
    whole = ask(served, n=2, logprobs=True, top_logprobs=3).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = parts_of(ask(served, n=2, logprobs=True, top_logprobs=3, **options))
    for choice in whole["choices"]:
        own = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"]["content"] for c in own) == choice["message"]["content"]
        assert [each for c in own for each in c["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    told = whole["choices"][0]["logprobs"]["content"]
    assert all(len(each["top_logprobs"]) == 3 and each["logprob"] <= 0 for each in told)
    assert all(bytes(each["bytes"]).decode() == each["token"] for each in told)


def test_without_a_limit_a_chat_may_fill_the_context(served):
    answer = served.post("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"2": 100}, "max_tokens": None})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


def test_parts_of_text_are_one_text(served):
    parts = [{"type": "text", "text": "came to"}, {"type": "text", "text": " the harbour"}]
    assert (
        ask(served, [MESSAGES[0], {"role": "user", "content": parts}]).json()["choices"]
        == ask(served).json()["choices"]
    )


def test_what_a_client_got_may_come_back(served):
    from openai.types.chat import ChatCompletion

    message = ChatCompletion.model_validate(ask(served).json()).choices[0].message.model_dump()
    assert ask(served, [*MESSAGES, message]).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 1},
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "nobody", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost"}}]}]},
        {"messages": [{"role": "user", "content": "a"}] * 1025},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_not_done_is_refused(served, fields):
    answer = ask(served, **{"messages": MESSAGES, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_model_without_a_template_refuses_chats(serve):
    answer = ask(serve())
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"


def test_a_template_that_fails_on_a_chat_is_the_chats_fault(serve):
    server = serve(chat="{% if messages|length > 1 %}{{ raise_exception('one turn\nat most') }}{% endif %}the")
    answer = ask(server)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "one turn at most" in answer.json()["error"]["message"]
    assert ask(server, MESSAGES[:1]).status_code == 200
