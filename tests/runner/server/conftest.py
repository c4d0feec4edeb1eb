"""Servers in this process, on a free port, over a tiny random model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moa.demo import MODEL_FOLDER
from moa.hf import model_shape
from moa.hf.load import load_model, load_tokenizer
from moa.plan import Plan
from moa.runner.engine import Engine
from moa.runner.server.run import Server, address_of, listen
from moa.runner.server.service import Service, new_service
from moa.runner.server.settings import ServerSettings
from moa.runner.settings import EngineSettings

# A chat as the demo's tokenizer can write it, whose words are its vocabulary.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' <unk> ' ~ m.content ~ ' .' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' the' }}{% endif %}"
)
WORDS = "boris came to the harbour and nadia left the old castle . the dog follows anna ."
WAIT_S = 60.0


@dataclass
class Running:
    """A server that runs."""

    url: str
    service: Service
    server: Server
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=WAIT_S, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def complete(self, prompt: Any = WORDS, **fields: Any) -> dict[str, Any]:
        """The answer of /v1/completions, which must be one."""
        answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=WAIT_S)

    def wait_idle(self) -> None:
        """Nothing runs, waits or holds memory but the prefix cache, and no request is at work."""
        engine = self.service.served.engine
        wait(lambda: self.service.served.queue() == (0, 0) and not self.service.requests)
        wait(lambda: engine.host.account.used_slots == engine.host.cached_slots)


def wait(condition: Callable[[], bool]) -> None:
    """Until it holds; fails when it does not in a minute."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited a minute in vain"
        time.sleep(0.01)


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Serve while the block lasts; then the engine is idle, or the test has failed."""
    ready = threading.Event()
    with listen(service.settings) as listener:
        listener.listen()
        server = Server(service, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        thread.start()
        try:
            assert ready.wait(WAIT_S)
            yield Running(address_of(listener), service, server, thread)
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Callable[[], bool]], None]:
    """`wait_for(condition)`: until it holds."""
    return wait


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path):
    return load_tokenizer(str(tiny_folder))


@pytest.fixture
def serve(tiny_folder: Path) -> Iterator[Callable[..., Running]]:
    """`serve(plan=..., chat=..., engine={...}, **settings)`: a server until the test ends."""
    with serving(tiny_folder) as start:
        yield start


@pytest.fixture(scope="module")
def serve_module(tiny_folder: Path) -> Iterator[Callable[..., Running]]:
    """The same, until the module's last test has ended."""
    with serving(tiny_folder) as start:
        yield start


@contextmanager
def serving(folder: Path) -> Iterator[Callable[..., Running]]:
    with ExitStack() as stack:

        def start(*, plan: Plan | None = None, chat: str | None = None, engine: Any = None, **settings: Any) -> Running:
            return stack.enter_context(running(make_service(folder, plan, chat, engine or {}, settings)))

        yield start


@pytest.fixture
def serve_demo() -> Iterator[Callable[[Plan | None], Running]]:
    """`serve_demo(plan)`: the model that ships, until the test ends."""
    with ExitStack() as stack:

        def start(plan: Plan | None) -> Running:
            service = make_service(MODEL_FOLDER, plan, None, {"kv_bytes": 256 << 20}, {"name": "demo"})
            return stack.enter_context(running(service))

        yield start


@pytest.fixture(scope="module")
def served(tiny_folder: Path) -> Iterator[Running]:
    """One server under a plan, with a chat template, for all tests of a module."""
    plan = small_plan(load_model(str(tiny_folder)))
    with running(make_service(tiny_folder, plan, TEMPLATE, {}, {})) as server:
        yield server


@pytest.fixture
def service_for(tiny_folder: Path) -> Iterator[Callable[..., Service]]:
    """`service_for(chat=..., **settings)`: a service that nobody serves yet."""
    made: list[Service] = []

    def make(chat: str | None = None, **settings: Any) -> Service:
        made.append(make_service(tiny_folder, None, chat, {}, settings))
        return made[-1]

    yield make
    for service in made:
        service.texts.close()


def small_plan(model: Any) -> Plan:
    rules = (((0, 0.5), (20, 0.0)), ((0, 1.0), (0, 0.25)))
    return Plan.model_validate({"model": model_shape(model), "rules": rules, "sink_tokens": 4, "min_span_tokens": 16})


def make_service(
    folder: Path, plan: Plan | None, chat: str | None, engine: dict[str, Any], settings: dict[str, Any]
) -> Service:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = chat
    engine_settings = EngineSettings(**{"kv_bytes": 4 << 20, **engine})
    made = Engine(load_model(str(folder)), plan, engine_settings, tokenizer=tokenizer)
    return new_service(made, tokenizer, ServerSettings(**{"port": 0, "name": "tiny", **settings}))
