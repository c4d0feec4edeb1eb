"""`moa eval`: dense beside a plan on the same samples, through lm-eval. `moa eval prefetch`: get all it needs beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from moa import demo
from moa.cli.output import emit, emit_json, note

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moa.eval.paired.records import PairedReport
    from moa.eval.paired.run import Way
    from moa.eval.paired.settings import EvalSettings
    from moa.plan import Plan
    from moa.stages import Progress

RUN = "run"


class RunByDefault(TyperGroup):
    """`moa eval MODEL` is `moa eval run MODEL`; a folder called `prefetch` is `./prefetch`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in where it is left out."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    help="Evaluate a model, dense beside a plan: moa eval MODEL --plan PLAN --tasks TASKS --lengths LENGTHS.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ModelName = Annotated[str, typer.Argument(help="Model folder or hub id; 'demo' is the model that ships with moa.")]
Tasks = Annotated[
    str, typer.Option(help="Tasks, tags or patterns, separated by commas; moa lm-eval ls subtasks lists them.")
]
Lengths = Annotated[str, typer.Option(help="Lengths of made-up tasks, in tokens, separated by commas.")]
NumSamples = Annotated[int, typer.Option(help="Samples of made-up tasks per length; RULER takes 500.")]
Seed = Annotated[int, typer.Option(help="Seed of made-up tasks.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a model on the hub.")]
PassagesFile = Annotated[
    Path | None,
    typer.Option(help="JSON lines of passage, question and answers for moa_qa_1, in place of made-up ones."),
]
TextFile = Annotated[Path | None, typer.Option(help="Text for moa_perplexity, in place of made-up prose.")]
DataFolder = Annotated[
    Path | None, typer.Option(help="Folder with LV-Eval's own files (.zip or .jsonl), in place of the hub's.")
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder of more lm-eval tasks.")]


@app.command(RUN)
def run(
    model: ModelName = "demo",
    plan: Annotated[
        str | None, typer.Option(help="Plan file, folder or hub id, or 'demo'. Without one, dense alone.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Also run, at the plan's KV bytes: streamingllm, uniform, duo, pyramid, or kvpress:NAME (h2o, snapkv, ...). "
            "Separated by commas, or repeated."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="profile.safetensors of moa compress: ranks heads for duo. Default: the one beside the plan."
        ),
    ] = None,
    tasks: Tasks = "",
    lengths: Lengths = "4096",
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the results.")] = Path("eval"),
    num_samples: NumSamples = 100,
    seed: Seed = 42,
    limit: Annotated[float | None, typer.Option(help="Samples per task, for a smoke test; no number counts.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, auto or auto:N; auto is 1 on a CPU.")] = "1",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Room for prompt and answer. Default: what the lengths need.")
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a prompt computed at a time, where answers are written; bounds memory."),
    ] = None,
    chat_template: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Write prompts by the tokenizer's chat template, if it has one."),
    ] = "auto",
    backend: Annotated[str, typer.Option(help="Attention under the plan: torch, or reference.")] = "torch",
    allow_other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Take a plan made for other weights of the same shape.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Weights' dtype; 'auto' is the checkpoint's.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, such as 'auto' or 'cuda'.")] = None,
    revision: Revision = "main",
    passages_file: PassagesFile = None,
    text_file: TextFile = None,
    data_folder: DataFolder = None,
    include_path: IncludePath = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on truncated or unpaired samples, too long texts, and --limit.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Also keep prompts and answers in full.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier results.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write the report as JSON.")] = False,
) -> None:
    """Evaluate dense, then under the plan, on the same samples; write both and their differences."""
    from moa.eval.harness import require_lm_eval

    require_lm_eval()
    with ExitStack() as stack:
        if offline:
            from moa.eval.offline import offline as without_network

            stack.enter_context(without_network())
        settings = _settings(
            model, tasks, lengths, passages_file, text_file, data_folder, include_path, revision=revision,
            num_samples=num_samples, data_seed=seed, limit=limit, batch_size=batch_size, max_length_tokens=max_length,
            prefill_chunk_tokens=prefill_chunk, chat_template=chat_template, dtype=dtype, device_map=device_map,
        )  # fmt: skip
        place = demo.resolve(plan) if plan else None
        compared = _Compared(place, _names(baseline, plan), profile, backend, allow_other_weights)
        report = _evaluate(settings, compared, output_dir, overwrite, log_samples)
    if report is None:  # a process that helps another one
        return
    _show(report, output_dir, json)
    _be_strict(report, strict)


@app.command()
def prefetch(
    model: ModelName = "demo",
    tasks: Tasks = "",
    lengths: Lengths = "4096",
    num_samples: NumSamples = 100,
    seed: Seed = 42,
    revision: Revision = "main",
    passages_file: PassagesFile = None,
    text_file: TextFile = None,
    data_folder: DataFolder = None,
    include_path: IncludePath = None,
) -> None:
    """Get a model, and get or make the data of its tasks, so that moa eval --offline with the same options finds all."""
    from moa.eval.harness import require_lm_eval

    require_lm_eval()
    from moa.eval.paired.model import fetch_model
    from moa.eval.paired.tasks import load_tasks

    settings = _settings(
        model, tasks, lengths, passages_file, text_file, data_folder, include_path, revision=revision,
        num_samples=num_samples, data_seed=seed,
    )  # fmt: skip
    place = fetch_model(settings)
    loaded = load_tasks(settings, place)
    samples = sum(len(task.eval_docs) for task in loaded.tasks.values())
    emit(f"{len(loaded.tasks)} tasks with {samples} samples are here: {', '.join(loaded.tasks)}")


def _settings(
    model: str,
    tasks: str,
    lengths: str,
    passages_file: Path | None,
    text_file: Path | None,
    data_folder: Path | None,
    include_path: Path | None,
    **given: Any,
) -> EvalSettings:
    from moa.errors import InputError, UsageError
    from moa.eval.paired.settings import DEFAULT_TASKS, DEMO_TASKS, EvalSettings

    try:
        lengths_tokens = tuple(int(part) for part in lengths.split(","))
    except ValueError:
        raise UsageError(f"--lengths must be whole numbers separated by commas, got {lengths!r}") from None
    files = {"passages_file": passages_file, "text_file": text_file, "data_folder": data_folder}
    for path in (*files.values(), include_path):
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file or folder")
    return EvalSettings(
        model,
        tuple(tasks.split(",")) if tasks else DEMO_TASKS if model == "demo" else DEFAULT_TASKS,
        tuple(dict.fromkeys(lengths_tokens)),
        options={name: str(path.resolve()) for name, path in files.items() if path},
        include_path=str(include_path) if include_path else None,
        **given,
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """What is evaluated beside dense."""

    plan: str | None
    baselines: tuple[str, ...]
    profile: Path | None
    backend: str
    allow_other_weights: bool

    def ways(self, plan: Plan | None, model: PreTrainedModel, lengths_tokens: Sequence[int]) -> list[Way]:
        """The plan and its baselines."""
        from moa.eval.paired.run import Way

        if plan is None or self.plan is None:
            return []
        options: dict[str, Any] = {"backend": self.backend, "allow_other_weights": self.allow_other_weights}
        ours = Way.under(plan, **options)
        if not self.baselines:
            return [ours]
        from moa.eval.paired.baselines import baseline_ways, profile_beside

        profile = self.profile or profile_beside(self.plan)
        return [ours, *baseline_ways(self.baselines, plan, model, lengths_tokens, profile=profile, **options)]


def _names(given: list[str] | None, plan: str | None) -> tuple[str, ...]:
    from moa.errors import UsageError

    names = tuple(name for each in given or () for name in each.split(",") if name)
    if names and plan is None:
        raise UsageError("--baseline compares at equal KV bytes; say with --plan whose")
    return names


def _evaluate(
    settings: EvalSettings, compared: _Compared, folder: Path, overwrite: bool, log_samples: bool
) -> PairedReport | None:
    """The report, written; None in a process that only helps another one."""
    from moa.distributed import environment

    with _place(folder, overwrite) if environment()[0] == 0 else _helping() as progress:
        from moa.distributed import own_device
        from moa.eval.paired.model import fetch_model
        from moa.eval.paired.report import write_outcome
        from moa.eval.paired.run import run_paired
        from moa.eval.paired.tasks import load_tasks
        from moa.hf.load import check_dtype, load_model, load_tokenizer
        from moa.plan import load_plan

        check_dtype(settings.dtype)
        wanted = load_plan(compared.plan) if compared.plan else None
        place = fetch_model(settings)
        tasks = load_tasks(settings, place)
        loaded = load_model(place, settings.dtype, own_device(settings.device_map))
        ways = compared.ways(wanted, loaded, settings.lengths_tokens)
        outcome = run_paired(loaded, load_tokenizer(place), tasks, settings, ways, progress)
        return write_outcome(outcome, folder, log_samples=log_samples) if outcome else None


@contextmanager
def _place(folder: Path, overwrite: bool) -> Iterator[Progress]:
    """The folder, locked and logged in; lm-eval's progress bars are for terminals alone."""
    import sys
    from contextlib import nullcontext, redirect_stderr

    from moa.cli.output import require_free
    from moa.cli.progress import logging_to, showing, telling
    from moa.errors import UsageError
    from moa.eval.paired.report import REPORT_JSON
    from moa.lock import lock_folder
    from moa.stages import LOG_NAME

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    require_free(folder / REPORT_JSON, overwrite)
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(_WithoutBars(sys.stderr))
    try:
        with showing() as progress, telling(), logging_to(folder / LOG_NAME), _lm_eval_logged(), bars:
            yield progress
    finally:
        lock.release()


@contextmanager
def _lm_eval_logged() -> Iterator[None]:
    """Write what lm-eval logs into our log file if there is one, not to stderr: it warns of each task of several lengths."""
    import logging

    theirs, files = logging.getLogger("lm_eval"), logging.getLogger("moa").handlers
    before = theirs.handlers, theirs.propagate
    kept: list[logging.Handler] = [each for each in files if isinstance(each, logging.FileHandler)]
    theirs.handlers, theirs.propagate = kept or [logging.NullHandler()], False
    try:
        yield
    finally:
        theirs.handlers, theirs.propagate = before


@contextmanager
def _helping() -> Iterator[Progress]:
    from moa.stages import silent

    with _lm_eval_logged():
        yield silent


class _WithoutBars:
    """A text stream that leaves out lines which draw themselves over and over."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._in_bar = stream, False

    def write(self, text: str) -> int:
        left_out = text.startswith("\r") or (self._in_bar and not text.strip())  # and the end of such a line
        self._in_bar = left_out
        if not left_out:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _show(report: PairedReport, folder: Path, json: bool) -> None:
    from moa.eval.paired.markdown import to_text
    from moa.eval.paired.report import REPORT_HTML, REPORT_MD, to_json
    from moa.eval.paired.view import View

    if json:
        emit_json(to_json(report))
        return
    emit(to_text(View(report)))
    emit(f"\nReport: {folder / REPORT_MD}; as a page: {folder / REPORT_HTML}")


def _be_strict(report: PairedReport, strict: bool) -> None:
    from moa.errors import MoaError

    problems = report.problems()
    if strict and problems:
        raise MoaError(f"--strict: {'; '.join(problems)}")
    for problem in problems:
        note(f"moa: warning: {problem}")
