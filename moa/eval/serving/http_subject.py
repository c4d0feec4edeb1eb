"""An OpenAI-compatible server as a subject: one connection per request, tokens as they stream in."""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from moa.errors import UsageError
from moa.eval.serving.clock import Clock, WallClock
from moa.eval.serving.drive import Event
from moa.eval.serving.workload import Load

# A connection on which nothing comes for so long has failed.
TIMEOUT_S = 600.0
MOST_WAIT_S = 3600.0
DATA, DONE = b"data:", b"[DONE]"
SHOWN_CHARACTERS = 300


class HttpSubject:
    """A server behind `/v1/completions`, asked with token ids.

    Args:
        base_url: of the server, as in http://127.0.0.1:8000.
        model: it is asked for; None for the first that it lists.
        api_key: sent as a bearer token.
        timeout_s: for connecting, and between pieces.

    Raises:
        UsageError: the address is none, or the server does not answer as one that has models.
    """

    def __init__(
        self, base_url: str, model: str | None = None, api_key: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--base-url must look like http://127.0.0.1:8000, got {base_url!r}")
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.clock: Clock = WallClock()
        self._timeout_s, self._come, self._session = timeout_s, queue.SimpleQueue[tuple[int, Event]](), 0
        self.model = model or self._first_model()
        self.name = f"server, {self.model}"
        self.about: Mapping[str, object] = {"plan": "the server's"}

    def check(self, load: Load) -> None:
        """Ask one request before anything is timed.

        Raises:
            UsageError: it fails; gives the server's own words.
        """
        events = list(self._pieces(0, load))
        failed = next((event.error for event in events if event.error), "")
        if failed or not any(event.tokens for event in events):
            raise UsageError(f"the server does not answer a first request: {failed or 'it sent no token'}")

    def submit(self, request: int, load: Load) -> None:
        """Send a request from a thread of its own."""
        threading.Thread(target=self._ask, args=(self._session, request, load), daemon=True).start()

    def events(self, until_s: float) -> list[Event]:
        """What has come in."""
        wait = MOST_WAIT_S if math.isinf(until_s) else max(0.0, until_s - self.clock())
        found = []
        try:
            found.append(self._come.get(timeout=wait))
            while True:
                found.append(self._come.get_nowait())
        except queue.Empty:
            return [event for session, event in found if session == self._session]

    def cancel_all(self) -> None:
        """Hang up on all that is open, each at its next piece."""
        self._session += 1

    def _ask(self, session: int, request: int, load: Load) -> None:
        for event in self._pieces(request, load):
            if session != self._session:
                return
            self._come.put((session, event))

    def _pieces(self, request: int, load: Load) -> Iterator[Event]:
        """Events of one request; whatever goes wrong is the last one's error."""
        connection = self._kind(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", f"{self._path}/completions", self._body(load), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise HTTPException(f"{answer.status} {answer.reason}: {_shown(answer.read(4096))}")
            yield from self._streamed(request, answer)
        except (OSError, HTTPException, ValueError) as error:
            yield Event(request, self.clock(), 0, is_last=True, error=f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def _streamed(self, request: int, answer: HTTPResponse) -> Iterator[Event]:
        total = None
        for line in answer:
            text = line.strip()
            if not text.startswith(DATA):
                continue
            data = text.removeprefix(DATA).strip()
            if data == DONE:
                yield Event(request, self.clock(), 0, is_last=True, total_tokens=total)
                return
            piece = json.loads(data)
            if "error" in piece:
                raise HTTPException(_shown(data))
            total = (piece.get("usage") or {}).get("completion_tokens", total)
            if any(_says(choice) for choice in piece.get("choices", ())):
                yield Event(request, self.clock(), 1)
        raise HTTPException("the stream ended before data: [DONE]")

    def _body(self, load: Load) -> bytes:
        asked = {
            "model": self.model,
            "prompt": list(load.prompt),
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(asked).encode()

    def _first_model(self) -> str:
        connection = self._kind(self._host, self._port, timeout=min(30.0, self._timeout_s))
        try:
            connection.request("GET", f"{self._path}/models", headers=self._headers)
            answer = connection.getresponse()
            body = answer.read(1 << 20)
            if answer.status != 200:
                raise HTTPException(f"{answer.status} {answer.reason}: {_shown(body)}")
            return str(json.loads(body)["data"][0]["id"])
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise UsageError(
                f"no server lists its models under {self._path}/models of {self._host}:{self._port}: "
                f"{type(error).__name__}: {error}; start it first, or name another --base-url"
            ) from None
        finally:
            connection.close()


def _says(choice: Any) -> bool:
    """Whether a piece has anything to read; servers open and close streams with empty ones."""
    return bool(choice.get("text"))


def _shown(body: bytes) -> str:
    return body.decode(errors="replace")[:SHOWN_CHARACTERS]
