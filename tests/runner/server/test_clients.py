"""Clients that people have, unmodified, against a server that runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import openai
import pytest

WORDS = "boris came to the harbour and nadia left the old castle ."
MESSAGES = [{"role": "user", "content": "came to the harbour"}]


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_completions(served, client):
    whole = client.completions.create(model="tiny", prompt=WORDS, max_tokens=8, temperature=0, logprobs=2)
    text = whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, len(whole.choices[0].logprobs.token_logprobs)) == (8, 8)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.completions.create(model="tiny", prompt=WORDS, max_tokens=8, temperature=0, **options))
    assert "".join(choice.text for part in parts for choice in part.choices) == text
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "ignore_eos": True}
    again = client.completions.create(model="tiny", prompt=WORDS, max_tokens=8, temperature=1, extra_body=extra)
    assert again.choices[0].text == text


def test_openai_chats(served, client):
    fields = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**fields, top_logprobs=2, n=2, seed=-5, user="nobody")
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[1].logprobs.content) == whole.usage.completion_tokens // 2
    parts = list(client.chat.completions.create(**fields, stream=True))
    text = "".join(part.choices[0].delta.content for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason in ("stop", "length")
    with client.chat.completions.stream(**fields) as stream:
        assert stream.get_final_completion().choices[0].message.content == text


async def _all_at_once(url: str) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(model="tiny", prompt=WORDS, seed=i, max_tokens=8, stream=True)
            return "".join([choice.text async for part in stream for choice in part.choices])

        return await asyncio.gather(*(one(i % 4) for i in range(24)))


def test_openai_requests_beside_each_other(served):
    import asyncio

    texts = asyncio.run(_all_at_once(served.url))
    assert texts == texts[:4] * 6
    assert len(set(texts)) == 4


def test_openai_models_and_errors(served, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "moa"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="the")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="the", temperature=5)
    assert wrong.value.param == "temperature"
    served.service.requests += 1  # else it would leave at once
    served.server.drain()
    try:
        with pytest.raises(openai.InternalServerError) as closing:
            client.completions.create(model="tiny", prompt="the")
        assert closing.value.status_code == 503
    finally:
        served.service.is_draining = False
        served.service.requests -= 1


def test_openai_needs_the_key(serve):
    server = serve(api_keys=("correct-horse",))
    for key, is_right in (("wrong-horses", False), ("correct-horse", True)):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            if is_right:
                assert client.models.list()
            else:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()


def test_an_error_in_the_midst_of_a_stream_reaches_the_client(serve, monkeypatch):
    server = serve()
    engine = server.service.served.engine
    run, calls = engine._run, []

    def fail(layout):
        calls.append(layout)
        if len(calls) == 4:
            raise RuntimeError("the model breaks")
        return run(layout)

    monkeypatch.setattr(engine, "_run", fail)
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 9, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        got = []
        parts = client.completions.create(**asked, stream=True)
        with pytest.raises(openai.APIError, match="the model breaks"):
            got.extend(parts)
        assert 1 <= len(got) <= 3  # several tokens may come together
        calls.clear()
        with pytest.raises(openai.InternalServerError, match="the model breaks"):
            client.completions.create(**asked)
        assert client.completions.create(**asked)
    server.wait_idle()


def test_guidellm(served, tiny_folder, tmp_path):
    """A load generator, where it is installed: its own environment's, named by GUIDELLM, or on the path."""
    program = os.environ.get("GUIDELLM") or shutil.which("guidellm")
    if program is None:
        pytest.skip("guidellm is not installed, and no GUIDELLM names it")
    backend = json.dumps({"kind": "openai_http", "target": served.url, "request_format": "/v1/completions"})
    data = json.dumps({"kind": "synthetic_text", "prompt_tokens": 32, "output_tokens": 8})
    result = tmp_path / "result.json"
    words = ["run", "--backend", backend, "--profile", "kind=concurrent,streams=4", "--data", data]
    words += ["--constraint", "kind=max_requests,count=32", "--tokenizer", f"kind=huggingface_auto,model={tiny_folder}"]
    words += ["--output", f"kind=json,path={result}", "--disable-console-interactive"]
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    totals = json.loads(result.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["errored"] == 0
    assert totals["successful"] >= 16  # it leaves the last ones where they are
