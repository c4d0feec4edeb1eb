"""`moa serve` as a process: it starts, answers, and ends as it is told."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from moa.cli.app import app

WORDS = "boris came to the harbour ."


@contextmanager
def process(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process, and where it listens."""
    command = [sys.executable, "-m", "moa", "serve", *words, "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment}
    started = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        said = []
        for line in started.stderr:
            said.append(line)
            if found := re.search(r"http://\S+", line):
                yield started, found[0]
                break
        else:
            pytest.fail("".join(said))
    finally:
        started.kill()
        started.communicate()


@pytest.mark.slow
def test_sigterm_lets_requests_finish_and_takes_no_more():
    with process("demo", "--plan", "demo", MOA_API_KEY="correct-horse") as (served, url):
        headers = {"Authorization": "Bearer correct-horse"}
        assert listening(served.pid) == [int(url.rpartition(":")[2])], "another socket listens, or for others"
        assert "correct-horse" not in Path(f"/proc/{served.pid}/cmdline").read_text()
        fields = {"model": "demo", "prompt": WORDS, "max_tokens": 300, "ignore_eos": True, "temperature": 0}
        with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
            whole = client.post("/v1/completions", json=fields).json()["choices"][0]["text"]
            with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
                lines = (line for line in answer.iter_lines() if line)
                got = [next(lines)]
                served.send_signal(signal.SIGTERM)
                assert wait_closing(url) == 503
                refused = httpx2.post(f"{url}/v1/completions", json=fields, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
                assert "retry-after" in refused.headers
                got += lines
        assert got.pop() == "data: [DONE]"
        parts = [json.loads(line.removeprefix("data: ")) for line in got]
        assert "".join(part["choices"][0]["text"] for part in parts) == whole
        assert served.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))


@pytest.mark.slow
def test_the_load_generator_measures_a_server(tmp_path, monkeypatch):
    with process("demo", MOA_API_KEY="correct-horse") as (_, url):
        typed = f"bench serve --base-url {url} --request-rate inf,50 --turns 1 --goodput ttft:60000".split()
        typed += "--num-prompts 4 --prompt-tokens 20:30 --output-tokens 3 -o".split()
        monkeypatch.setenv("MOA_API_KEY", "correct-horse")
        result = CliRunner().invoke(app, [*typed, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out/serve.json").read_text())
    for keys in told["runs"]:
        assert (keys["completed"], keys["failed"]) == (4, 0)
        assert keys["total_output_tokens"] == 12
        assert keys["request_goodput"] == keys["request_throughput"]
    assert not {"threads", "dtype", "plan"} & set(told["moa"]), "of the server, whose they would be, nothing is known"
    page = (tmp_path / "out/README.md").read_text()
    assert "what the server runs on is not known" in page
    assert "correct-horse" not in page + json.dumps(told)


def wait_closing(url: str) -> int:
    """The status of /health once it is no longer 200; 503 where nobody answers any more."""
    while True:
        try:
            status = httpx2.get(f"{url}/health", timeout=60).status_code
        except httpx2.TransportError:
            return 503
        if status != 200:
            return status


def listening(pid: int) -> list[int]:
    """Ports of this machine's own address that a process listens at; -1 for one that others can reach."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            inodes.add(str(handle.readlink()))
    ports = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            cells = row.split()
            if f"socket:[{cells[9]}]" in inodes and cells[3] in ("0A", "07"):  # listening; a UDP socket
                address, port = cells[1].split(":")
                ports.append(int(port, 16) if address == "0100007F" else -1)
    return ports


def run(*words: str, **env: str):
    return CliRunner().invoke(app, ["serve", *words], env=env)


def test_a_port_in_use_is_told_before_the_model_is_loaded():
    from moa.errors import ResourceError

    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("/nowhere/model", "--port", str(taken.getsockname()[1]))
    assert isinstance(result.exception, ResourceError)
    assert "--port" in str(result.exception)


def test_a_model_that_is_not_there_is_told():
    from moa.errors import ModelError

    assert isinstance(run("./nowhere", "--port", "0").exception, ModelError)


def test_others_are_not_let_in_without_a_key(tmp_path):
    from moa.errors import UsageError

    assert isinstance(run("demo", "--host", "0.0.0.0").exception, UsageError)
    for file, content in (("missing", None), ("empty", " \n"), ("short", "abc")):
        if content is not None:
            (tmp_path / file).write_text(content)
        result = run("demo", "--host", "0.0.0.0", "--api-key-file", str(tmp_path / file))
        assert isinstance(result.exception, UsageError)
