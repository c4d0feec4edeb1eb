"""/metrics, /health and /version."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from prometheus_client.parser import text_string_to_metric_families

NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens generation_tokens request_success
num_preemptions time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens
request_generation_tokens
""".split()


def samples(server) -> dict[str, float]:
    with server.client() as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    told = {family.name for family in families if not family.name.endswith("_created")}
    assert told == {f"moa:{name}" for name in NAMES}
    return {
        s.name + "".join(f"{{{value}}}" for key, value in s.labels.items() if key != "le"): s.value
        for family in families
        for s in family.samples
        if s.labels.get("le") in (None, "+Inf")
    }


def test_requests_are_counted(serve):
    server = serve(engine={"max_running": 1})
    assert samples(server)["moa:generation_tokens_total"] == 0
    for n, max_tokens in ((1, 5), (2, 3), (1, 1)):
        server.complete("the castle", n=n, max_tokens=max_tokens, ignore_eos=True)
    server.complete("the castle", max_tokens=50, logit_bias={"2": 100})
    told = samples(server)
    assert told["moa:request_success_total{length}"] == 4
    assert told["moa:request_success_total{stop}"] == 1
    assert told["moa:request_success_total{cancelled}"] == told["moa:request_success_total{error}"] == 0
    assert told["moa:generation_tokens_total"] == told["moa:request_generation_tokens_sum"] == 5 + 6 + 1 + 1
    assert told["moa:prompt_tokens_total"] == told["moa:request_prompt_tokens_sum"] == 4 * 3
    assert told["moa:request_prompt_tokens_count"] == 4, "a prompt counts once, not for each of its completions"
    assert told["moa:time_to_first_token_seconds_count"] == 5
    assert (
        1 <= told["moa:inter_token_latency_seconds_count"] <= 4 + 2 + 2
    )  # those that come with the first tell nothing
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert told[f"moa:{name}_seconds_count"] == 5
    parts = sum(told[f"moa:request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode"))
    assert 0 < parts <= told["moa:e2e_request_latency_seconds_sum"]
    assert told["moa:request_queue_time_seconds_sum"] > 0, "nobody waited"


def test_requests_whose_clients_hang_up_are_counted(serve):
    server = serve()
    slow = {"prompt": "the castle", "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 2}
    with server.client() as client, client.stream("POST", "/v1/completions", json=slow) as answer:
        next(answer.iter_lines())
    server.wait_idle()
    told = samples(server)
    assert told["moa:request_success_total{cancelled}"] == 2
    assert told["moa:prompt_tokens_total"] == told["moa:request_prompt_tokens_sum"] == 3


def test_the_queue_and_the_memory_are_told(serve, wait_for):
    server = serve(engine={"max_running": 1, "prefix_cache_ratio": 0.0})
    slow = {"prompt": "the castle", "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 3}
    with server.client() as client, client.stream("POST", "/v1/completions", json=slow) as answer:
        lines = answer.iter_lines()
        next(lines)
        told = samples(server)
        assert (told["moa:num_requests_running"], told["moa:num_requests_waiting"]) == (1, 2)
        assert 0 < told["moa:kv_cache_usage_perc"] <= 1
    server.wait_idle()
    wait_for(lambda: samples(server)["moa:kv_cache_usage_perc"] == 0)


@pytest.mark.parametrize("state", ["ready", "closing", "failed"])
def test_health(serve, state, monkeypatch):
    server = serve()
    if state == "closing":
        server.service.requests = 1  # else it would leave at once
        server.server.drain()
    if state == "failed":
        monkeypatch.setattr(server.service.served, "hang_s", -1.0)
        monkeypatch.setattr(server.service.served, "_is_stepping", True)
    with server.client() as client:
        answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (200 if state == "ready" else 503, {"status": state})
    server.service.requests = 0


def test_version(served):
    with served.client() as client:
        assert client.get("/version").json() == {"version": version("moa")}
