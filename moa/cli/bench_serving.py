"""`moa bench serve` and `moa bench throughput`: requests of many users at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa.cli.bench import OutputDir, page_in
from moa.cli.output import emit
from moa.cli.serve import KEY_VARIABLE

if TYPE_CHECKING:
    from moa.eval.serving.sweep import Sweep, Swept
    from moa.eval.serving.workload import Lengths


Models = Annotated[
    list[str] | None,
    typer.Argument(help="Models; 'demo' ships with moa, 'random-0.1b' has random weights. [default: both]"),
]
PlanName = Annotated[
    str | None, typer.Option(help="Plan file, folder or hub id; measured beside dense, for one model.")
]
Policies = Annotated[str, typer.Option(help="Scheduling policies, separated by commas.")]
Turns = Annotated[int, typer.Option(min=1, help="Turns of everything, each with a seed of its own.")]
Seed = Annotated[int, typer.Option(help="Seed of the first turn.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")]


def serve(
    output_dir: OutputDir,
    models: Models = None,
    plan: PlanName = None,
    policies: Policies = "sarathi,prefill-first,orca",
    turns: Turns = 3,
    seed: Seed = 0,
    request_rate: Annotated[
        str | None,
        typer.Option(
            help="Measure at these rates instead (requests per second, separated by commas; inf: all at once)."
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help=f"Measure this OpenAI-compatible server at --request-rate; its key is read from {KEY_VARIABLE}."
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="At given rates: requests per run.")] = 100,
    prompt_tokens: Annotated[
        str, typer.Option(help="At given rates: length of prompts, as MEDIAN or MEDIAN:P90 (log-normal).")
    ] = "256:512",
    output_tokens: Annotated[str, typer.Option(help="At given rates: length of outputs, in the same form.")] = "64",
    burstiness: Annotated[
        float, typer.Option(help="At given rates: 1 for Poisson arrivals, lower for burstier ones.")
    ] = 1,
    burst: Annotated[int, typer.Option(min=1, help="At given rates: so many requests arrive together.")] = 1,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="At given rates: requests in flight at most; the others wait at the client."),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="At given rates: ttft:MS, tpot:MS or e2el:MS that a request must keep; repeat it."),
    ] = None,
    metric_percentiles: Annotated[
        str, typer.Option(help="At given rates: percentiles, separated by commas.")
    ] = "50,90,99",
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="At given rates: a value per request in serve.json, too.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure requests that arrive while others decode, and the load that every scheduling policy can take."""
    from moa.errors import UsageError
    from moa.eval.serving.summary import Goals
    from moa.eval.serving.sweep import Sweep
    from moa.eval.serving.workload import Workload

    names = models or ["demo", "random-0.1b"]
    if plan is not None and len(names) > 1:
        raise UsageError("a plan is for one model; name that model")
    if base_url is None and request_rate is None:
        return _against_targets(names, plan, _words(policies), turns, seed, output_dir, overwrite)
    sweep = Sweep(
        Workload(
            _lengths(prompt_tokens, "--prompt-tokens"),
            _lengths(output_tokens, "--output-tokens"),
            num_prompts,
            vocabulary=256,  # of every model; replaced where the model is known
            burstiness=burstiness,
            burst=burst,
            max_concurrency=max_concurrency,
        ),
        rates=_numbers(request_rate or "inf", "--request-rate"),
        turns=turns,
        seed=seed,
        goals=Goals.of(goodput) if goodput else None,
        percentiles=_numbers(metric_percentiles, "--metric-percentiles"),
        has_details=save_detailed,
    )
    if base_url is not None:
        if plan is not None:
            raise UsageError("the server has a plan of its own; leave out --plan")
        return _of_server(base_url, models, sweep, output_dir, overwrite)
    if len(names) > 1:
        raise UsageError("rates are given for one model; name it")
    return _of_policies(names[0], plan, _words(policies), sweep, output_dir, overwrite)


def throughput(
    output_dir: OutputDir,
    models: Models = None,
    plan: PlanName = None,
    turns: Turns = 3,
    seed: Seed = 0,
    long_tokens: Annotated[
        int, typer.Option(min=0, help="Length of long texts, in tokens; 0 to leave them out.")
    ] = 8192,
    density: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of the uniform plan that long texts run under.")
    ] = 0.25,
    overwrite: Overwrite = False,
) -> None:
    """Measure all requests at once beside transformers, long texts under a plan, and what the engine itself costs."""
    from moa.errors import UsageError
    from moa.eval.serving.bench_throughput import LEAST_LONG, Settings, bench_throughput
    from moa.eval.serving.cases import get_cases
    from moa.eval.serving.throughput_report import write_report
    from moa.plan import load_plan

    names = models or ["demo", "random-0.1b"]
    if plan is not None and len(names) > 1:
        raise UsageError("a plan is for one model; name that model")
    if 0 < long_tokens < LEAST_LONG:
        raise UsageError(f"--long-tokens must be at least {LEAST_LONG}, or 0, got {long_tokens}")
    settings = Settings(turns, seed, None if plan is None else load_plan(plan), long_tokens, density)
    cases = get_cases(names)
    with page_in(output_dir, overwrite) as progress:
        write_report(bench_throughput(cases, settings, progress), settings, output_dir)


def _against_targets(
    names: list[str], plan: str | None, policies: tuple[str, ...], turns: int, seed: int, folder: Path, overwrite: bool
) -> None:
    from moa.eval.serving.bench_serve import Settings, bench_serve
    from moa.eval.serving.cases import get_cases
    from moa.eval.serving.serve_report import write_report
    from moa.plan import load_plan
    from moa.runner.policies import get_policy

    policies = tuple(get_policy(name).name for name in policies)
    settings = Settings(turns, seed, policies, None if plan is None else load_plan(plan))
    cases = get_cases(names)
    with page_in(folder, overwrite) as progress:
        write_report(bench_serve(cases, settings, progress), settings, folder)


def _of_policies(
    name: str, plan_name: str | None, policies: tuple[str, ...], sweep: Sweep, folder: Path, overwrite: bool
) -> None:
    from dataclasses import replace
    from functools import partial

    from moa.eval.serving.cases import get_case
    from moa.eval.serving.conditions import environment
    from moa.eval.serving.subjects import contestants, opener, sizes
    from moa.eval.serving.sweep import run_sweep
    from moa.eval.serving.sweep_report import write_sweep
    from moa.plan import load_plan
    from moa.runner.policies import get_policy
    from moa.runner.settings import TOKEN_BUDGET

    case, plan = get_case(name), None if plan_name is None else load_plan(plan_name)
    who = contestants([get_policy(policy).name for policy in policies], has_plan=plan is not None)
    budget = TOKEN_BUDGET
    with page_in(folder, overwrite) as progress:
        model = case.make()
        vocabulary, context = sizes(model)
        workload = replace(sweep.workload, vocabulary=vocabulary, context_tokens=context)
        subjects = [partial(opener(model, plan), one, budget) for one in who]
        told = environment(plan, str(model.dtype).removeprefix("torch."))
        swept = _shown(run_sweep(case.name, subjects, replace(sweep, workload=workload), progress), sweep)
        write_sweep(swept, sweep, told, folder)


def _of_server(base_url: str, models: list[str] | None, sweep: Sweep, folder: Path, overwrite: bool) -> None:
    from contextlib import nullcontext
    from dataclasses import replace

    from moa.errors import UsageError
    from moa.eval.serving.conditions import client_environment
    from moa.eval.serving.http_subject import HttpSubject
    from moa.eval.serving.sweep import run_sweep
    from moa.eval.serving.sweep_report import write_sweep

    if models and len(models) > 1:
        raise UsageError("a server is asked for one model; name one, or none for the first that it lists")
    with page_in(folder, overwrite) as progress:
        server = HttpSubject(base_url, models[0] if models else None, os.environ.get(KEY_VARIABLE))
        server.check(replace(sweep.workload, count=1).requests(0)[0])
        swept = _shown(run_sweep(server.model, [lambda: nullcontext(server)], sweep, progress), sweep)
        write_sweep(swept, sweep, client_environment(), folder)


def _shown(swept: Iterable[Swept], sweep: Sweep) -> list[Swept]:
    """All runs, each printed as it comes."""
    from moa.eval.serving.console import block

    told = []
    for one in swept:
        emit(one.row.subject)
        emit(block(one.keys, one.row.rate, sweep.workload.max_concurrency, percentiles=sweep.percentiles))
        told.append(one)
    return told


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _numbers(text: str, option: str) -> tuple[float, ...]:
    from moa.errors import UsageError

    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"{option} takes numbers separated by commas, got {text!r}") from None


def _lengths(text: str, option: str) -> Lengths:
    from moa.errors import UsageError
    from moa.eval.serving.workload import Lengths

    median, _, p90 = text.partition(":")
    try:
        return Lengths(float(median), float(p90 or median))
    except ValueError:
        raise UsageError(f"{option} takes MEDIAN or MEDIAN:P90, got {text!r}") from None
