"""Clients that go, stall or dawdle: their work ends, their connections close, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest

from moa.runner.server.texts import Texts

LONG = {"prompt": "the castle", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}


def request(body: dict, path: str = "/v1/completions", length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content) if length is None else length}\r\n\r\n".encode() + content


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed; waits for it, and throws away what comes before."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_work_ends_when_its_client_goes(served, wait_for, stream, tokens):
    """At any time: before it is queued, at the first token, in the midst."""
    finished, engine = served.service.served.stats.finished, served.service.served.engine

    def generated() -> int:
        return sum(each.output_tokens for group in list(engine._live.values()) for each in list(group))

    before = finished.copy()
    with served.connect() as connection:
        connection.sendall(request({**LONG, "stream": stream, "n": 3}))
        wait_for(lambda: served.service.requests == 1)
        wait_for(lambda: generated() >= tokens)
    served.complete(max_tokens=1)  # goes the same way to the engine: what was sent before it has arrived, too
    served.wait_idle()
    ended = (finished - before)["cancelled"]
    assert ended == 3 or (not tokens and not ended)


def test_work_that_waits_ends_when_its_client_goes(serve, wait_for):
    server = serve(engine={"max_running": 1})
    with server.connect() as first, server.connect() as second:
        first.sendall(request({**LONG, "stream": True}))
        wait_for(lambda: server.service.served.queue() == (1, 0))
        second.sendall(request(LONG))
        wait_for(lambda: server.service.served.queue() == (1, 1))
        second.close()
        wait_for(lambda: server.service.served.queue() == (1, 0))
    server.wait_idle()


def test_a_client_that_stops_reading_is_cut_off_and_others_are_not(serve, wait_for):
    server = serve(stall_s=0.5, engine={"max_running": 64})
    # Many log-probabilities, so that little output fills the sockets' buffers.
    body = {**LONG, "max_tokens": 2040, "n": 64, "stream": True, "logprobs": 20, "prompt": "the"}
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(server.address)
        stalled.sendall(request(body))
        wait_for(lambda: server.service.requests == 1)
        assert server.complete(max_tokens=2)
        wait_for(lambda: not server.server.server_state.connections)
        server.wait_idle()
        assert server.service.served.stats.finished["cancelled"] > 0, "all of it went into buffers"
    assert server.complete(max_tokens=2)


def test_a_header_must_come_in_time(serve):
    server = serve(header_s=0.3)
    with server.connect() as silent, server.connect() as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        assert is_closed(silent)
        assert is_closed(slow)


def test_bytes_that_trickle_in_do_not_set_the_clock_back(serve):
    server = serve(header_s=0.3, body_s=0.3)
    for begin in (b"GET /health HTTP/1.1\r\nX-A: ", request(LONG, length=10_000)[:-1]):
        with server.connect() as slow:
            slow.sendall(begin)
            stop = threading.Event()

            def trickle(slow=slow, stop=stop):
                while not stop.wait(0.02):
                    try:
                        slow.sendall(b" ")
                    except OSError:
                        return

            feeder = threading.Thread(target=trickle)
            feeder.start()
            assert is_closed(slow)
            stop.set()
            feeder.join()


def test_a_body_that_comes_too_slowly_is_told_so(serve):
    server = serve(body_s=0.3)
    with server.connect() as slow:
        slow.sendall(request(LONG, length=10_000))
        answer = b""
        while part := slow.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"


def test_a_body_that_nobody_reads_must_end_too(serve):
    server = serve(body_s=0.3)
    with server.connect() as slow:
        slow.sendall(request({}, path="/nowhere", length=10_000))
        assert slow.recv(64).startswith(b"HTTP/1.1 404 ")
        assert is_closed(slow)


def test_a_connection_serves_request_after_request(serve):
    server = serve(header_s=0.3)
    with server.client() as client:
        for _ in range(3):
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "the", "max_tokens": 1}).status_code == 200
    body = request({"prompt": "the", "max_tokens": 1})
    with server.connect() as pipelined:
        pipelined.sendall(body + body + body)
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 3:
            answers += pipelined.recv(4096)


def test_connections_are_limited_in_number(serve, wait_for):
    server = serve(connections=8, header_s=600)
    held = [server.connect() for _ in range(40)]
    for connection in held:
        connection.settimeout(0)
    closed: set[int] = set()

    def are_closed(number: int) -> bool:
        for i, connection in enumerate(held):
            try:
                connection.recv(1)
            except BlockingIOError:
                continue
            except ConnectionError:
                pass
            closed.add(i)
        return len(closed) >= number

    wait_for(lambda: are_closed(32))
    assert len(closed) == len(server.server.server_state.connections) * 4 == 32
    for connection in held:
        connection.close()
    wait_for(lambda: not server.server.server_state.connections)
    assert server.complete(max_tokens=1)


def test_a_large_header_is_refused(served):
    with served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        try:
            for _ in range(64):
                connection.sendall(b"x" * 16_384)
        except ConnectionError:
            pass
        assert is_closed(connection)
    with served.client() as client:
        assert client.get("/health").status_code == 200


def test_no_thread_of_the_loop_tokenises(serve, monkeypatch, wait_for):
    """A prompt that takes for ever: everybody else is answered meanwhile."""
    going, entered = threading.Event(), threading.Event()
    encoded = Texts._encoded

    def slowly(self, text, **options):
        if text == "slow":
            entered.set()
            assert going.wait(60)
        return encoded(self, text, **options)

    server = serve()
    monkeypatch.setattr(Texts, "_encoded", slowly)
    thread = threading.Thread(target=server.complete, args=("slow",), kwargs={"max_tokens": 1})
    thread.start()
    try:
        assert entered.wait(60)
        assert server.complete(max_tokens=2)
        with server.client() as client:
            for path in ("/health", "/metrics", "/", "/v1/models"):
                assert client.get(path).status_code == 200
    finally:
        going.set()
        thread.join()


def test_tokenising_leaves_python_to_others(tokenizer):
    """The loop turns while a long text is read: the tokenizer holds no lock all the while, as its encode() would."""
    text = "the castle " * 60_000

    async def turns(encode) -> int:
        task, count = asyncio.ensure_future(asyncio.to_thread(encode)), 0
        while not task.done():
            await asyncio.sleep(0.001)
            count += 1
        return count

    texts = Texts(tokenizer)
    ours = asyncio.run(turns(lambda: texts._encoded(text, add_special_tokens=True)))
    held = asyncio.run(turns(lambda: tokenizer.backend_tokenizer.encode(text)))
    texts.close()
    assert ours > 3 * held
    assert texts._encoded("the castle", add_special_tokens=True) == tuple(tokenizer("the castle")["input_ids"])
