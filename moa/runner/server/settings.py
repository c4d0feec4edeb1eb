"""How the server runs: one frozen record."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from moa.errors import UsageError

LOCAL_NAMES = ("localhost", "ip6-localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the server listens, who may ask, and what one client can take at most.

    Args:
        host, port: where it listens; port 0 takes a free one.
        name: what clients call the model.
        api_keys: any of them lets a client in; without one, everybody who can reach the address.
        insecure: listen beyond this machine without a key.
        body_bytes: of a request.
        requests: at work or queued at a time, over all clients; more get 503.
        connections: open at a time; more are closed at once.
        header_s, body_s: seconds that a client may take to send a request's header, and its body.
        request_s: seconds that a request may take in all.
        stall_s: a client that has read nothing for so long, with output waiting for it, is cut off.
        grace_s: seconds that requests get to finish after SIGTERM.
        hang_s: a step of the engine longer than this makes the server unhealthy.

    Raises:
        UsageError: a number that cannot be, or an address that others can reach while there is no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "model"
    api_keys: tuple[str, ...] = ()
    insecure: bool = False
    body_bytes: int = 4 << 20
    requests: int = 256
    connections: int = 512
    header_s: float = 10.0
    body_s: float = 30.0
    request_s: float = 600.0
    stall_s: float = 30.0
    grace_s: float = 30.0
    hang_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("body_bytes", "requests", "connections"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("header_s", "body_s", "request_s", "stall_s", "hang_s"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must lie in [0, 65535], got {self.port}")
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise UsageError("an API key must be at least 8 printable ASCII characters without blanks")
        if not (self.is_local or self.api_keys or self.insecure):
            raise UsageError(
                f"others can reach {self.host}, and there is no API key; give --api-key-file or MOA_API_KEY, "
                "listen on 127.0.0.1, or say --insecure"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_local(self.host)


def is_local(host: str) -> bool:
    """Whether a name or an address means this machine, and no name server has a say in it."""
    if host in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
