"""Keys: on every route but /health, in either form, and told to nobody."""

from __future__ import annotations

import base64

import pytest

from moa.errors import UsageError
from moa.runner.server import gate
from moa.runner.server.settings import ServerSettings

KEYS = ("correct-horse", "battery-staple")


@pytest.fixture
def locked(serve):
    return serve(api_keys=KEYS)


def paths_of(server) -> list[tuple[str, str]]:
    with server.client(headers={"Authorization": f"Bearer {KEYS[0]}"}) as client:
        described = client.get("/openapi.json").json()["paths"]
    found = [(method.upper(), path.replace("{name}", "tiny")) for path, each in described.items() for method in each]
    return [*found, ("GET", "/"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("DELETE", "/v1/models")]


def test_every_path_but_health_needs_a_key(locked):
    paths = paths_of(locked)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/version"} <= {p for _, p in paths}
    with locked.client() as client:
        for method, path in paths:
            answer = client.request(method, path)
            assert answer.status_code == (200 if path == "/health" else 401), path
            if path != "/health":
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


@pytest.mark.parametrize("key", KEYS)
def test_either_key_lets_in_in_either_form(locked, key):
    with locked.client() as client:
        for header in (f"Bearer {key}", f"bearer  {key}", basic(key)):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer correct", f"Bearer {KEYS[0]}x", KEYS[0], "Basic !", basic("x"), "Basic YQ=="],
)
def test_nothing_else_does(locked, header):
    with locked.client() as client:
        assert client.get("/v1/models", headers={"Authorization": header}).status_code == 401
        doubled = [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", header or "x")]
        assert client.get("/v1/models", headers=doubled).status_code == 401


def test_all_keys_are_compared_in_constant_time(locked, monkeypatch):
    compared = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return first == second

    monkeypatch.setattr(gate.hmac, "compare_digest", compare)
    with locked.client() as client:
        for key in (KEYS[0], KEYS[1], "no", "x" * 4000):
            client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert compared == [(32, 32)] * 8


def test_keys_are_in_no_answer(locked):
    with locked.client(headers={"Authorization": f"Bearer {KEYS[0]}"}) as client:
        for path in ("/", "/metrics", "/openapi.json", "/v1/models", "/nowhere"):
            assert not any(key in client.get(path).text for key in KEYS)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_not_let_in_without_a_key(host):
    with pytest.raises(UsageError, match="API key"):
        ServerSettings(host=host)
    assert not ServerSettings(host=host, insecure=True).is_local
    assert ServerSettings(host=host, api_keys=KEYS).api_keys == KEYS


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.5"])
def test_this_machine_needs_none(host):
    assert ServerSettings(host=host).is_local


@pytest.mark.parametrize("key", ["", "short", "with blank inside", "ümlaut-and-more", "line\nbreak-in-it"])
def test_a_key_that_no_header_could_carry_is_refused(key):
    with pytest.raises(UsageError, match="API key"):
        ServerSettings(api_keys=(key,))


HERE = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"]
ELSEWHERE = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5:80"]
ELSEWHERE += ["[::2]:8000", "", "localhost@evil.example", "[evil.example]"]


@pytest.fixture(scope="module")
def keyless(serve_module):
    return serve_module()


@pytest.mark.parametrize("host", HERE)
def test_a_server_without_keys_answers_to_this_machines_names(keyless, host):
    with keyless.client(headers={"Host": host}) as client:
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("host", ELSEWHERE)
def test_a_server_without_keys_answers_to_no_other_name(keyless, host):
    """A web page whose name leads here would read the answer."""
    with keyless.client(headers={"Host": host}) as client:
        for path in ("/", "/health", "/v1/models"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
        assert client.post("/v1/completions", json={"prompt": "the"}).status_code == 403


@pytest.mark.parametrize("settings", [{"api_keys": KEYS}, {"insecure": True}], ids=["keys", "insecure"])
def test_any_name_will_do_with_a_key_or_said_to_be_insecure(serve, settings):
    headers = {"Host": "moa.example", "Authorization": f"Bearer {KEYS[0]}"}
    with serve(**settings).client(headers=headers) as client:
        assert client.get("/v1/models").status_code == 200
