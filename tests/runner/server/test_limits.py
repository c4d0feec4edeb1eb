"""What is refused: with the right status and OpenAI's error body, and the server as before."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx2
import pytest

from moa.runner.request import SamplingParams
from moa.runner.server import body as body_module
from moa.runner.server.failures import ApiError
from moa.runner.server.work import Job, Work

JSON = {"Content-Type": "application/json"}


def refused(answer: httpx2.Response, status: int = 400) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000
    return error


BOUNDS = {
    "n": [0, -1, 129, 1.0, True, "1", 2**64],
    "max_tokens": [-1, 2**24 + 1, 2**70, 0.5, "3"],
    "temperature": [-0.1, 2.1, 1e9, "1", True],
    "top_p": [0, -1, 1.1, 1e308],
    "top_k": [-2, 2**31, 1.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 11],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "logprobs": [-1, 21, 388, 389, True],
    "stop": ["", ["a"] * 17, ["x" * 257], [1], {"a": 1}, [""]],
    "stop_token_ids": [[-1], [2**31], [1.0], [True], list(range(17)), 5],
    "seed": [2**64, -(2**63) - 1, 1.5, "1"],
    "logit_bias": [{"a": 1}, {"1": 101}, {"-1": 1}, {"1": "x"}, {"388": None}, {"389": 1}, {"9" * 20: 1}, [1]],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}],
    "best_of": [1, 5],
    "suffix": ["a"],
    "echo": [1],
    "prompt": [None, [], {}, 5, [[]], ["a", 1], [1, "a"], [[1], "a", 1.5], [-1], [389], [2**31], [True], ["a"] * 129],
    "temprature": [1],
    "model": [5, "x" * 513],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BOUNDS.items() for value in values], ids=lambda v: str(v)[:24]
)
def test_a_field_that_cannot_be_is_refused_by_name(served, name, value):
    error = refused(served.post("/v1/completions", {"prompt": "the castle", "max_tokens": 1, name: value}))
    assert name in error["message"] or error["param"] == name


def test_an_unknown_field_names_the_nearest(served):
    error = refused(served.post("/v1/completions", {"prompt": "the", "temprature": 1}))
    assert "'temperature'" in error["message"]


def test_many_unknown_or_wrong_things_make_one_error(served):
    many = {f"field{i}": i for i in range(100_000)}
    refused(served.post("/v1/completions", {"prompt": "the", **many}))
    refused(served.post("/v1/completions", {"prompt": ["a", *range(300_000)]}))
    refused(served.post("/v1/completions", {"prompt": "the", "logit_bias": many}))
    refused(served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [5] * 300_000}]}))


BODIES = {
    "empty": b"",
    "text": b"hello",
    "array": b"[]",
    "null": b"null",
    "cut": b'{"prompt": "a',
    "trailing": b'{"prompt": "a"} x',
    "invalid utf-8": b'{"prompt": "\xff"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "bom": b'\xef\xbb\xbf{"prompt": "a"}',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "too large": b'{"prompt": "a", "temperature": 1e999}',
    "digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "half in a name": b'{"prompt": "a", "\\ud800": 1}',
    "half in a model": b'{"prompt": "a", "model": "\\ud800"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_request_is_refused(served, body):
    with served.client() as client:
        refused(client.post("/v1/completions", content=body, headers=JSON))


def test_a_field_twice_is_its_last(served):
    with served.client() as client:
        body = b'{"prompt": "a", "max_tokens": 5, "max_tokens": 1, "temperature": 0}'
        assert client.post("/v1/completions", content=body, headers=JSON).json()["usage"]["completion_tokens"] == 1


def test_nul_and_odd_characters_are_text_like_any(served):
    for prompt in ("\x00", "a\x00b", "\u202e\ufeff", "😀" * 50, "\r\n\x1b[31mred", "\u200b"):
        assert served.complete(prompt, max_tokens=1, echo=True)["choices"][0]["text"].startswith(prompt)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken_which_other_web_pages_cannot_send(served, kind):
    with served.client() as client:
        refused(client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind}), 415)


def test_a_body_is_limited_whether_or_not_it_tells_its_length(serve):
    server = serve(body_bytes=10_000)
    fitting = json.dumps({"prompt": "the", "max_tokens": 1, "user": "x" * 9_000}).encode()
    with server.client() as client:
        assert client.post("/v1/completions", content=fitting, headers=JSON).status_code == 200
        for body in (fitting + b" " * 1000, b" " * 10_000_000):
            refused(client.post("/v1/completions", content=body, headers=JSON), 413)
        try:
            told = client.post("/v1/completions", content=iter([b" " * 4_000] * 4_000), headers=JSON)
        except httpx2.TransportError:
            pass  # the connection was closed while it still sent
        else:
            refused(told, 413)
    assert server.complete(max_tokens=1)


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(served):
    error = refused(served.post("/v1/completions", {"prompt": [5] * 2049}))
    assert error["code"] == "context_length_exceeded"
    assert "2049" in error["message"]
    assert "2048" in error["message"]
    error = refused(served.post("/v1/completions", {"prompt": [5] * 2048, "max_tokens": 1}))
    assert error["code"] == "context_length_exceeded"
    assert served.complete([5] * 2047, max_tokens=1)
    assert served.complete([5] * 2047)["usage"]["completion_tokens"] == 1


def test_a_prompt_beyond_the_pool_is_refused_and_others_run(serve):
    server = serve(engine={"kv_bytes": 64 * 1024})  # room for some 240 tokens
    longest = server.service.longest_tokens
    assert 100 < longest < 400
    with server.client() as client:
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == longest
    error = refused(server.post("/v1/completions", {"prompt": [5] * (longest + 1), "max_tokens": 1}))
    assert error["code"] == "context_length_exceeded"
    assert server.complete([5] * longest, max_tokens=1)["usage"]["completion_tokens"] == 1
    assert server.complete([5] * 8, max_tokens=longest - 8, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
    server.wait_idle()


def test_too_many_choices_are_refused(served):
    refused(served.post("/v1/completions", {"prompt": ["the"] * 64, "n": 3}))
    refused(served.post("/v1/completions", {"prompt": ["the"] * 129}))


def test_another_model_is_not_found(served):
    for body in ({"prompt": "a", "model": "gpt"}, {"prompt": "a", "model": "gpt\r\n\x1b[31m"}):
        assert refused(served.post("/v1/completions", body), 404)["code"] == "model_not_found"
    with served.client() as client:
        refused(client.get("/v1/models/other/name"), 404)
        assert client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_paths_and_methods_that_are_not_there(served):
    with served.client() as client:
        refused(client.get("/v1/nothing"), 404)
        refused(client.get("/docs"), 404)
        refused(client.get("/v1/completions"), 405)
        refused(client.post("/health"), 405)


def test_a_full_queue_says_when_to_try_again(serve):
    server = serve(engine={"max_waiting": 3})
    answer = server.post("/v1/completions", {"prompt": ["the"] * 4, "max_tokens": 1})
    error = refused(answer, 503)
    assert (error["code"], answer.headers["retry-after"]) == ("queue_full", "1")
    server.wait_idle()
    assert len(server.complete("the", n=3, max_tokens=1)["choices"]) == 3
    refused(server.post("/v1/completions", {"prompt": "the", "n": 4, "max_tokens": 1}))  # never, so not later


def test_too_many_requests_at_a_time_are_refused(serve):
    server = serve(requests=1)
    slow = {"prompt": "the", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=slow) as answer:
        lines = answer.iter_lines()
        next(lines)
        error = refused(server.post("/v1/completions", {"prompt": "the"}), 503)
        assert error["code"] == "overloaded"
        with server.client() as other:
            assert other.get("/health").status_code == 200
    server.wait_idle()
    assert server.complete(max_tokens=1)


def test_a_request_has_only_so_long(serve):
    server = serve(request_s=0.3)
    fields = {"prompt": "the", "max_tokens": 1900, "ignore_eos": True}
    assert refused(server.post("/v1/completions", fields), 503)["code"] == "timeout"
    lines = [line for line in server.post("/v1/completions", {**fields, "stream": True}).text.split("\n\n") if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert lines[-1] == "data: [DONE]"
    server.wait_idle()


def test_a_stream_that_is_read_slowly_is_told_that_time_is_up(service_for):
    """The clock runs out while the reader holds up the stream, not while the stream waits for the engine."""

    texts: list[str] = []

    async def slowly(work: Work) -> None:
        async for _, update in work.updates():
            texts.append(update.text)
            await asyncio.sleep(0.4)

    async def read() -> None:
        service = service_for(request_s=0.3)
        async with service.served:
            work = Work(service, [Job((5, 6), SamplingParams(max_tokens=1900, ignore_eos=True))], "slow")
            await work.start()
            with pytest.raises(ApiError) as told:
                await slowly(work)
            assert told.value.code == "timeout"
            while service.served.queue() != (0, 0):  # its work has ended, too
                await asyncio.sleep(0.01)

    asyncio.run(read())
    assert len(texts) == 1


@pytest.mark.parametrize("held", ["parse", "encode", "submit"])
def test_time_runs_from_when_a_request_comes(serve, monkeypatch, wait_for, held):
    """Whatever takes long: to read it, to write it in tokens, or to queue it while a step goes on."""
    server, goes_on = serve(request_s=0.2), threading.Event()
    engine, texts = server.service.served.engine, server.service.texts

    def hold(real):
        return lambda *args, **kwargs: (goes_on.wait(60), real(*args, **kwargs))[1]

    place, name = {"parse": (body_module, "_parsed"), "encode": (texts, "_encoded"), "submit": (engine, "add")}[held]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, hold(getattr(place, name)))
        try:
            assert refused(server.post("/v1/completions", {"prompt": "the", "max_tokens": 1}), 503)["code"] == "timeout"
            assert not goes_on.is_set()
        finally:
            goes_on.set()
    server.wait_idle()
