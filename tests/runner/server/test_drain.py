"""Closing: requests at work finish within the grace time, the rest are ended and told, and the exit says what it was."""

from __future__ import annotations

import asyncio
import json
import signal
import threading

import pytest

from moa.errors import MoaError, ModelError
from moa.runner.server import run as run_module
from moa.runner.server import texts
from moa.runner.server.run import Server, listen, run

LONG = {"prompt": "the castle", "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 4}
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def begin(client, body: dict):
    """A stream of an answer."""
    return client.stream("POST", "/v1/completions", json=body)


def test_requests_at_work_finish(serve):
    server = serve(grace_s=60)
    with server.client() as client, begin(client, {**LONG, "max_tokens": 200}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        with server.client() as other:
            health = other.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "closing")
            refused = other.post("/v1/completions", json={"prompt": "the"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
            assert "retry-after" in refused.headers
        *parts, done = lines
    assert done == "data: [DONE]"
    ends = [json.loads(part.removeprefix("data: "))["choices"][0]["finish_reason"] for part in parts]
    assert ends.count("length") == 4
    server.thread.join(60)
    assert not server.thread.is_alive()


@pytest.mark.parametrize(("grace_s", "signals"), [(0.2, [signal.SIGTERM]), (60, [signal.SIGTERM, signal.SIGINT])])
def test_what_does_not_finish_in_time_is_ended_and_told(serve, grace_s, signals):
    server = serve(grace_s=grace_s)
    with server.client() as client, begin(client, LONG) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        for number in signals:
            server.server.handle_exit(number, None)
        *_, error, done = lines
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "cancelled"
    assert done == "data: [DONE]"
    server.thread.join(60)
    assert not server.thread.is_alive()
    account = server.service.served.engine.host.account
    assert (account.used_slots, account.holders) == (0, 0)


def test_a_client_that_reads_nothing_holds_up_nobody(serve):
    server = serve(grace_s=0.2)
    with server.connect() as idle, server.connect() as stalled:
        body = json.dumps(LONG).encode()
        stalled.sendall(HEAD % len(body) + body)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert idle.recv(1) == b""


def outcome_of(service, stop) -> BaseException | None:
    """What `run` ends with, when `stop(service)` is called once it serves."""
    ended: list[BaseException | None] = []
    ready = threading.Event()

    def serve() -> None:
        with listen(service.settings) as listener:
            listener.listen()
            try:
                run(service, listener, ready.set)
            except BaseException as error:  # noqa: BLE001 - what it ends with is the question
                ended.append(error)
            else:
                ended.append(None)

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(60)
    stop(service)
    thread.join(60)
    return ended[0]


def test_an_engine_that_dies_ends_the_server_with_its_error(service_for):
    def die() -> None:
        raise SystemError("no engine")

    ended = outcome_of(service_for(), lambda service: service.served._send(die))
    assert isinstance(ended, MoaError)
    assert "no engine" in str(ended)


def test_a_second_signal_leaves_a_step_that_hangs(service_for, wait_for, monkeypatch):
    servers, made, service, goes_on = [], Server.__init__, service_for(grace_s=60), threading.Event()
    monkeypatch.setattr(Server, "__init__", lambda self, *a: (servers.append(self), made(self, *a))[1])
    monkeypatch.setattr(run_module, "FORCED_S", 0.1)
    engine, stepping = service.served.engine, threading.Event()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (stepping.set(), goes_on.wait(60), step())[2])

    def stop(service) -> None:
        servers[0].service.served._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(service.served.submit([5])))
        assert stepping.wait(60)
        for number in (signal.SIGTERM, signal.SIGTERM):
            servers[0].handle_exit(number, None)

    try:
        ended = outcome_of(service, stop)
        assert not goes_on.is_set()
    finally:
        goes_on.set()
    assert isinstance(ended, MoaError)
    assert "did not end" in str(ended)
    wait_for(lambda: not service.served._thread.is_alive())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, None), (signal.SIGINT, 130)])
def test_the_exit_says_what_it_was(service_for, monkeypatch, number, code):
    servers, made = [], Server.__init__
    monkeypatch.setattr(Server, "__init__", lambda self, *a: (servers.append(self), made(self, *a))[1])
    ended = outcome_of(service_for(), lambda _: servers[0].handle_exit(number, None))
    assert (ended.code if isinstance(ended, SystemExit) else ended) == code


def test_a_chat_template_that_does_not_end_is_refused_at_the_start(service_for, monkeypatch):
    monkeypatch.setattr(texts, "TEMPLATE_S", 0.2)
    loop = (
        "{% for i in range(300) %}{% for j in range(300) %}{% for k in range(60) %}{% endfor %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ModelError, match="takes longer"):
        service_for(chat=loop)
    monkeypatch.setattr(texts, "TEMPLATE_S", 60)
    with pytest.raises(ModelError, match="characters"):
        service_for(chat="{{ 'x' * 2000000 }}")
    gadget = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert service_for(chat=gadget).texts.has_chat_template, "it fails for each chat, and harms nobody"
