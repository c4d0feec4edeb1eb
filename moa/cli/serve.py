"""`moa serve`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa.cli.output import note

if TYPE_CHECKING:
    from moa.runner.server.service import Service

KEY_VARIABLE = "MOA_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str, typer.Argument(help="Model folder or hub id; 'demo' is the model that ships with moa.")],
    plan: Annotated[
        str | None, typer.Option(help="Plan file, folder or hub id, or 'demo'. Without one, dense attention.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's need an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the last part of MODEL.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File of API keys, one a line; {KEY_VARIABLE} in the environment is one too.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen to others without an API key.")] = False,
    policy: Annotated[str, typer.Option(help="sarathi, prefill-first, orca or request-level.")] = "sarathi",
    order: Annotated[str, typer.Option(help="Of waiting requests: fcfs, or spf (shortest prompt first).")] = "fcfs",
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens of a step, decodes included.")] = 512,
    max_running: Annotated[int, typer.Option(min=1, help="Requests in memory at a time.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Completions that may wait; more get 503.")] = 1024,
    kv_gib: Annotated[
        float | None, typer.Option(min=0, help="KV memory of all requests. Default: half of what is free.")
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(min=2, help="Prompt and output together. Default: what the model says.")
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="HTTP requests at work; more get 503.")] = 256,
    max_body_mib: Annotated[float, typer.Option(min=0.01, help="Size of a request.")] = 4.0,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that requests get to finish after SIGTERM.")] = 30.0,
    backend: Annotated[str, typer.Option(help="Attention: torch, triton (CUDA) or reference.")] = "torch",
    kv_dtype: Annotated[str | None, typer.Option(help="With triton, int8 or fp8 quantises the KV cache.")] = None,
    allow_other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Take a plan made for other weights of the same shape.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Weights' dtype; 'auto' is the checkpoint's.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, such as 'auto' or 'cuda'.")] = None,
) -> None:
    """Serve a model under its plan: OpenAI's completions and chats, metrics, and a status page at /."""
    from moa import demo
    from moa.errors import MoaError

    if any(find_spec(name) is None for name in NEEDED):
        raise MoaError("the server's libraries are not installed; run: pip install 'moa[serve]'")
    from moa.runner.server.run import address_of, listen, run
    from moa.runner.server.settings import ServerSettings
    from moa.runner.settings import EngineSettings

    settings = ServerSettings(
        host=host, port=port, name=served_model_name or Path(model).name, api_keys=_keys(api_key_file),
        insecure=insecure, requests=max_requests, body_bytes=int(max_body_mib * 2**20), request_s=request_timeout,
        grace_s=grace,
    )  # fmt: skip
    engine_settings = EngineSettings(
        policy=policy, order=order, token_budget=token_budget, max_running=max_running, max_waiting=max_waiting,
        kv_bytes=None if kv_gib is None else int(kv_gib * 2**30), context_tokens=context_tokens, backend=backend,
        kv_dtype=kv_dtype, allow_other_weights=allow_other_weights,
    )  # fmt: skip
    with listen(settings) as listener:
        service = _loaded(
            demo.resolve(model), plan and demo.resolve(plan), dtype, device_map, engine_settings, settings
        )
        listener.listen()
        under = "dense" if service.plan is None else f"under plan {service.plan.sha256[:12]}"
        note(f"moa: serving {settings.name} {under} at {address_of(listener)}")
        run(service, listener)


def _loaded(
    path: str, plan: str | None, dtype: str, device_map: str | None, engine_settings: Any, settings: Any
) -> Service:
    from moa.hf.load import load_model, load_tokenizer
    from moa.runner.engine import Engine
    from moa.runner.server.service import new_service

    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype, device_map)
    return new_service(Engine(model, plan, engine_settings, tokenizer=tokenizer), tokenizer, settings)


def _keys(file: Path | None) -> tuple[str, ...]:
    """Keys of file and environment; no option takes one, because others can read a process's arguments."""
    from moa.errors import UsageError

    keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise UsageError(f"--api-key-file {file} cannot be read: {error}") from None
        if not lines:
            raise UsageError(f"--api-key-file {file} holds no key")
        keys += lines
    return tuple(keys)
