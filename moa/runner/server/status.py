"""GET /: the server at a glance. One page that loads nothing and reads without JavaScript; a few lines of it refresh it."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from moa.plan import Plan
from moa.runner.server.service import Service, service_of

FOLDER = Path(__file__).parent / "page"
CELL, LEFT, TOP = 14, 28, 16  # pixels
LATENCIES = {"ttft": "request to first token", "itl": "between tokens", "e2e": "request to last token"}


async def status_page(request: Request) -> HTMLResponse:
    """Queue, memory, latency, and the plan."""
    service = service_of(request)
    style, script = (_read(name) for name in ("page.css", "page.js"))
    page = _environment().get_template("page.html.jinja")
    body = page.render(style=Markup(style), script=Markup(script), **_facts(service))  # ours, not from outside
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(body, headers=headers)


def _facts(service: Service) -> dict[str, Any]:
    metrics, stats = service.metrics, service.served.stats
    running, waiting = service.served.queue()
    usage = 0.0 if stats.last is None else stats.last.kv_usage_ratio
    told = [
        ("running", "running", f"{running:,}"),
        ("waiting", "waiting", f"{waiting:,}"),
        ("kv", "KV memory held", f"{usage:.1%}"),
        ("output", "tokens generated", f"{metrics.output_tokens:,}"),
        ("prompt", "tokens of prompts", f"{metrics.prompt_tokens:,}"),
        ("finished", "requests ended", f"{sum(metrics.finished.values()):,}"),
        ("preemptions", "preemptions", f"{stats.preemptions:,}"),
    ]
    return {
        "name": service.settings.name,
        "version": version("moa"),
        "plan": None if service.plan is None else _plan(service.plan, service.longest_tokens),
        "is_ready": service.is_ready,
        "state": _state(service),
        "facts": [{"id": name, "label": label, "value": value} for name, label, value in told],
        "latencies": [_latency(service, name, label) for name, label in LATENCIES.items()],
    }


def _state(service: Service) -> str:
    if not service.served.is_healthy:
        return "the engine has failed or hangs"
    return "closing: no more requests are taken" if service.is_draining else "ready"


def _latency(service: Service, name: str, label: str) -> dict[str, str]:
    found = service.metrics.percentiles(name)
    median, late = ("-", "-") if found is None else (f"{value * 1000:,.1f} ms" for value in found)
    return {"id": name, "label": label, "median": median, "late": late}


@cache
def _plan(plan: Plan, n_tokens: int) -> dict[str, Any]:
    """The picture: a square for each KV head, layers downwards."""
    shares = plan.span_rules.span(n_tokens) / n_tokens  # [L, HKV]
    layers, heads = shares.shape
    cells = [
        {
            "x": LEFT + head * CELL,
            "y": TOP + layer * CELL,
            "share": f"{shares[layer, head]:.3f}",
            "title": f"layer {layer}, KV head {head}: {shares[layer, head]:.1%}",
        }
        for layer in range(layers)
        for head in range(heads)
    ]
    every = max(1, layers // 16)
    rows = [(LEFT - 6, TOP + i * CELL + CELL - 4, "end", i) for i in range(0, layers, every)]
    columns = [(LEFT + i * CELL + CELL // 2, TOP - 5, "middle", i) for i in range(0, heads, max(1, heads // 16))]
    return {
        "digest": plan.sha256[:12],
        "density": f"{shares.mean():.1%}",
        "length": f"{n_tokens:,}",
        "width": LEFT + heads * CELL + 2,
        "height": TOP + layers * CELL + 2,
        "size": CELL,
        "heads": heads,
        "cells": cells,
        "labels": [{"x": x, "y": y, "anchor": anchor, "text": text} for x, y, anchor, text in (*rows, *columns)],
        "rows": [[f"{share:.1%}" for share in row] for row in shares],
    }


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(FOLDER)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
