"""A hub on this machine: the few routes that creating, listing, committing to and downloading from a repository take."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., tuple[int, str, str]]


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory: `repos[id][name]` is a file's bytes; `sizes` overrides what is told of a file's size."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}  # large files, by sha256, between upload and commit
        self.sizes: dict[str, int] = {}
        self.cut: dict[str, int] = {}  # names whose download breaks off after so many bytes
        self.hold = ""  # a name whose download waits until `released`
        self.released = threading.Event()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, repo_id: str) -> str:
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.repos[repo_id].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # a client that was killed
                self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code)

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self._body()
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {**file, "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            keep = ("path", "uploadMode")
            self._answer({"files": [{**{k: f[k] for k in keep}, "shouldIgnore": False, "oid": None} for f in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{self.server.url}/lfs", "header": {}}}
            objects = [{**o, "actions": upload} for o in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._missing("RepoNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            self._answer({**url, "error": "exists"}, 409)
            return
        self.server.repos[name] = {}
        self.server.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        self._answer(url)

    def _commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repos[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        commit = self.server.commit_of(repo_id)
        self._answer(
            {"commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        data = self._body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer({}, ETag='"x"')

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if found := re.match(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^?]+))?(\?|$)", self.path):
            self._info(found[1], found[2])
        elif found := re.match(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", self.path):
            self._file(*found.groups())
        else:
            self._missing("RepoNotFound")

    def _info(self, repo_id: str, revision: str | None) -> None:
        if repo_id not in self.server.repos:
            self._missing("RepoNotFound")
            return
        commit = self.server.commit_of(repo_id)
        if revision not in (None, "main", commit):
            self._missing("RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in self.server.repos[repo_id]]
        content = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        self._answer({**content, "private": self.server.private.get(repo_id, False)})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        files = self.server.repos.get(repo_id)
        if files is None or name not in files:
            self._missing("RepoNotFound" if files is None else "EntryNotFound")
            return
        data = files[name]
        size = self.server.sizes.get(name, len(data))
        cut = self.server.cut.get(name)
        etag = hashlib.sha1(data).hexdigest()
        headers = {"X_Repo_Commit": self.server.commit_of(repo_id), "ETag": f'"{etag}"', "Content_Length": str(size)}
        if name == self.server.hold and self.command == "GET":
            self.server.released.wait(60)
        self._answer(data if cut is None else data[:cut], **headers)
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_test",
        "PYTHONPATH": str(ROOT),
    }
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**kept, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}


@pytest.fixture
def moa(environment: dict[str, str]) -> Command:
    """A command line in a process of its own: the hub's client reads its endpoint once."""

    def run(*arguments: object, **more: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "moa", *map(str, arguments)]
        done = subprocess.run(
            command, env={**environment, **more}, capture_output=True, text=True, check=False, timeout=120
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return run
