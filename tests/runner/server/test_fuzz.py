"""Requests that nobody means: made from the OpenAPI schema, and raw bytes. No 5xx but 503, and the server as before."""

from __future__ import annotations

import json
import socket

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Requests from the schema for each of two paths and two modes, and raw ones: 10,000 together in the long form.
FROM_SCHEMA = [pytest.param(30, id="quick"), pytest.param(1_000, id="many", marks=pytest.mark.nightly)]
RAW = [pytest.param(200, id="quick"), pytest.param(6_000, id="many", marks=pytest.mark.nightly)]
PATHS = ("/v1/completions", "/v1/chat/completions")
ANSWERS = {200, 400, 404, 503}
ODD_ANSWERS = ANSWERS | {405, 408, 413, 415}
CALM = {"database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def fuzzed(serve_module):
    """A server whose requests are short, whatever they ask for."""
    server = serve_module(engine={"context_tokens": 24}, chat="{% for m in messages %}{{ m.content }} {% endfor %}the")
    yield server
    assert not server.service.metrics.finished["error"]
    assert server.complete("the castle", max_tokens=4)
    server.wait_idle()


@pytest.fixture(scope="module")
def described(fuzzed):
    with fuzzed.client() as client:
        return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


@pytest.mark.parametrize("amount", FROM_SCHEMA)
@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", PATHS)
def test_requests_made_from_the_schema(fuzzed, described, path, mode, amount):
    seen: set[int] = set()
    allowed = ANSWERS if mode is schemathesis.GenerationMode.POSITIVE else ODD_ANSWERS

    @settings(**CALM, max_examples=amount)
    @given(case=described[path]["POST"].as_strategy(generation_mode=mode))
    def fuzz(case):
        answer = case.call(base_url=fuzzed.url, timeout=60)
        seen.add(answer.status_code)
        assert answer.status_code in allowed, answer.text[:500]
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    fuzz()
    fuzzed.wait_idle()
    wanted = 200 if mode is schemathesis.GenerationMode.POSITIVE else 400
    assert wanted in seen, "nothing of what was meant to be tried was tried"


VALID = json.dumps({"prompt": "the castle", "max_tokens": 2}).encode()
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    % len(VALID)
) + VALID
PIECES = [b"\r\n", b"\n", b"\x00", b":", b" ", b"HTTP/1.1", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n"]
PIECES += [
    b"Expect: 100-continue\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    b"%00",
    b"/../",
    b"{",
    b'"',
    b"\xff",
]
PIECES += [b"9" * 40, b"ffffffff\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"?", b"#", b"\\ud800", b"-1"]
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(REQUEST)),
        st.integers(0, 30),
        st.one_of(st.sampled_from(PIECES), st.binary(max_size=12)),
    ),
    max_size=6,
)


def mangled(edits) -> bytes:
    """The request with pieces taken out and put in."""
    request = REQUEST
    for place, length, piece in edits:
        request = request[:place] + piece + request[place + length :]
    return request


def answers_to(server, sent: bytes) -> bytes:
    with server.connect() as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has closed already
        got = b""
        try:
            while part := connection.recv(1 << 16):
                got += part
        except ConnectionError:
            pass
        return got


@pytest.mark.parametrize("amount", RAW)
def test_raw_bytes(fuzzed, amount):
    assert answers_to(fuzzed, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )
    seen = set()

    @settings(**CALM, max_examples=amount)
    @given(st.one_of(EDITS.map(mangled), st.binary(max_size=300), st.lists(st.sampled_from(PIECES)).map(b"".join)))
    def fuzz(sent):
        got = answers_to(fuzzed, sent)
        seen.add(got[:12])
        assert got == b"" or got.startswith(b"HTTP/1.1 "), got[:100]
        assert not got.startswith(b"HTTP/1.1 5"), got[:500]

    fuzz()
    assert b"HTTP/1.1 400" in seen
    fuzzed.wait_idle()
