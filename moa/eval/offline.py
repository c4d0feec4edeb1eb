"""No network: what may come from the hub must be here already, and any other attempt to reach out is refused.

The hub's libraries are told to stay offline. What does not ask them, such as a task that downloads a file by itself, is
stopped at its socket: Python reports every connection and name look-up to an audit hook. This machine may be reached.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moa.errors import DataError

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
LOCAL_NAMES = ("localhost", "", None, socket.gethostname())
_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")


class _Guard:
    """The audit hook; Python can never take one off again, so it is put on once and asks whether it is wanted."""

    def __init__(self) -> None:
        self.on = self.installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in _EVENTS:
            host = _host(event, arguments)
            if not _is_local(host):
                raise NetworkRefused(f"--offline, and {host} was to be reached")


class NetworkRefused(OSError):
    """Something wanted to reach the network while that was refused."""


_guard = _Guard()


@contextmanager
def offline() -> Iterator[None]:
    """Refuse the network within; to be entered before the hub's libraries are imported, for they look once.

    Raises:
        DataError: they have been imported already, without being told.
    """
    for name in ("huggingface_hub.constants", "datasets.config"):
        module = sys.modules.get(name)
        if module is not None and not getattr(module, "HF_HUB_OFFLINE", False):
            raise DataError(f"{name.split('.')[0]} is at work already; set HF_HUB_OFFLINE=1 before this process starts")
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(OFFLINE)
    if not _guard.installed:
        sys.addaudithook(_guard)
        _guard.installed = True
    _guard.on = True
    try:
        yield
    finally:
        _guard.on = False
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _host(event: str, arguments: tuple[Any, ...]) -> Any:
    """Whom an event is about; None for no network address."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        return arguments[0]
    family, address = arguments[0].family, arguments[1]
    return address[0] if family in (socket.AF_INET, socket.AF_INET6) and address else None


def _is_local(host: Any) -> bool:
    name = host.decode(errors="replace") if isinstance(host, bytes) else host
    if name in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(str(name).split("%")[0]).is_loopback
    except ValueError:
        return False
