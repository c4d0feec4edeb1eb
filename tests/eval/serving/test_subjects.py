"""What is measured serves the load generator: every subject gives every request its tokens, and leaves the model alone."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moa.errors import UsageError
from moa.eval.serving.clock import LeapingClock, WallClock
from moa.eval.serving.drive import drive
from moa.eval.serving.http_subject import HttpSubject
from moa.eval.serving.subjects import Contestant, contestants, opener
from moa.eval.serving.transformers_subject import LoopSubject, batching
from moa.eval.serving.workload import Lengths, Load, Workload
from moa.hf.shape import model_shape
from moa.plan import Plan

VOCABULARY = 64
LOADS = Workload(Lengths(20, 60, 3, 90), Lengths(4, 7), 6, VOCABULARY, rate=200.0).requests(0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="sdpa")).eval()


def assert_served(run, loads=LOADS):
    for one, load in zip(run.served, loads, strict=True):
        assert one.has_succeeded, one.error
        assert one.output_tokens == load.output_tokens == len(one.chunk_s)
        assert one.ttft_s > 0
        assert all(gap >= 0 for gap in one.gaps_s)


@pytest.mark.parametrize("policy", ["sarathi", "prefill-first", "orca", "request-level"])
def test_engine(model, policy):
    plan = Plan.uniform(model_shape(model), 0, 0.5)
    for who in contestants([policy], has_plan=True):
        with opener(model, plan, 1 << 22)(who, 32) as subject:
            assert subject.name == who.name
            assert_served(drive(subject, LOADS))
            assert subject.engine.is_idle
            assert subject.engine.stats.finished["length"] == len(LOADS)
    assert not hasattr(model, "moa")
    assert model.config._attn_implementation == "sdpa"


def test_engine_refusals_are_failures(model):
    with opener(model, None, 1 << 22)(Contestant("sarathi"), 32) as subject:
        run = drive(subject, (LOADS[0], Load(0.1, (5,) * 300, 4)))
    assert run.served[0].has_succeeded
    assert "context" in run.served[1].error


def test_engine_drops_what_is_given_up(model):
    with opener(model, None, 1 << 22)(Contestant("sarathi"), 32) as subject:
        assert drive(subject, LOADS, give_up=lambda one: True).is_given_up
        assert subject.engine.is_idle
        assert_served(drive(subject, LOADS))


def test_loop(model):
    assert_served(drive(LoopSubject(model), LOADS))


def test_transformers_batching(model):
    with batching(model, kv_tokens=2048, token_budget=64, max_running=8) as subject:
        assert_served(drive(subject, LOADS))
        assert_served(drive(subject, LOADS, max_concurrency=2))
    assert model.config._attn_implementation == "sdpa"


def test_leaping_clock_does_not_wait():
    clock, wall = LeapingClock(), WallClock()
    before, began = clock(), wall()
    clock.wait_until(before + 1000)
    assert 1000 <= clock() - before < 1100
    assert wall() - began < 100
    now = clock()
    clock.wait_until(now - 5)
    assert clock() - now < 100


class Answers(BaseHTTPRequestHandler):
    """A server that streams as many words as it is asked for."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, b'{"data": [{"id": "tiny"}]}')

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((asked, self.headers.get("Authorization")))
        if self.server.mode == "refuse":
            return self.reply(503, b'{"error": {"message": "full"}}')
        pieces = [{"choices": [{"text": ""}]}]  # as vLLM begins
        pieces += [{"choices": [{"text": "x"}]} for _ in range(asked["max_tokens"] - 1)]
        pieces += [{"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}}]
        if self.server.mode == "error":
            pieces = [{"error": {"message": "broken inside"}}]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces] + [": a comment\n\n"]
        lines += [] if self.server.mode == "cut" else ["data: [DONE]\n\n"]
        self.reply(200, "".join(lines).encode())

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    @contextmanager
    def run(mode="serve"):
        found = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        found.mode, found.asked = mode, []
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}", found.asked
        finally:
            found.shutdown()
            thread.join()
            found.server_close()

    return run


@pytest.mark.parametrize("path", ["", "/", "/v1"])
def test_server(server, path):
    with server() as (url, asked):
        subject = HttpSubject(url + path, api_key="secret")
        assert subject.model == "tiny"
        subject.check(LOADS[0])
        run = drive(subject, LOADS)
    for one, load in zip(run.served, LOADS, strict=True):
        assert one.has_succeeded
        assert one.output_tokens == load.output_tokens  # as the server counts, though one piece less was seen
        assert len(one.chunk_s) == load.output_tokens - 1
    assert {key for _, key in asked} == {"Bearer secret"}
    assert sorted(tuple(body["prompt"]) for body, _ in asked[1:]) == sorted(load.prompt for load in LOADS)
    assert all(body["stream"] and body["ignore_eos"] and body["temperature"] == 0 for body, _ in asked)


@pytest.mark.parametrize(("mode", "words"), [("refuse", "503.*full"), ("error", "broken inside"), ("cut", "DONE")])
def test_server_errors_are_told_in_its_words(server, mode, words):
    with server(mode) as (url, _):
        subject = HttpSubject(url)
        with pytest.raises(UsageError, match=words):
            subject.check(LOADS[0])
        run = drive(subject, LOADS)
    assert all(one.is_done and one.error and not one.has_succeeded for one in run.served)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ftp://x", "http://", "http://127.0.0.1:9"])
def test_no_server(url):
    with pytest.raises(UsageError, match="base-url"):
        HttpSubject(url, timeout_s=5.0)
