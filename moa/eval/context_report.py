"""What `moa bench context` writes: a CSV file, pictures, and a page of tables with an interval on every share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from transformers import PreTrainedModel

from moa.eval.bench_context import (
    CARRIED,
    EFFECTIVE,
    FAMILIES,
    FIXED,
    MOST_QUESTIONS,
    PLAN,
    REPLANNED,
    SEARCH,
    SEARCHES,
    SHARE,
    UNIFORM,
    ContextBench,
)
from moa.eval.conditions import environment
from moa.eval.context_figures import carried_picture, effective_picture, search_picture
from moa.eval.csv_rows import csv_rows
from moa.eval.effective_context import RECALL_LEVEL, ContextRow, Effective, effective_context, over_seeds
from moa.eval.labels import percent
from moa.eval.markdown import NOT_MEASURED, table
from moa.eval.records import DENSE
from moa.files import write_atomic
from moa.hf.load import context_tokens
from moa.local_paths import typed_command

Rows = Sequence[ContextRow]


def write_report(rows: Rows, settings: ContextBench, folder: Path, conditions: Sequence[str]) -> None:
    """Write recall.csv, three pictures and README.md, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "recall.csv", csv_rows(rows, ContextRow))
    write_atomic(folder / "effective.png", effective_picture(rows))
    write_atomic(folder / "search.png", search_picture(rows))
    write_atomic(folder / "carried.png", carried_picture(rows))
    write_atomic(folder / "README.md", page(rows, settings, conditions).encode())


def conditions_of(model: PreTrainedModel, name: str, settings: ContextBench) -> tuple[str, ...]:
    """Lines that say how the figures were taken."""
    e, s, context = environment(model), settings, context_tokens(model.config)
    seeds = f"seeds {', '.join(map(str, s.seeds))}; sinks {s.sink_tokens}, least span {s.min_span_tokens} tokens"
    families = f"questions of {' and '.join(FAMILIES)}, as many texts of each"
    return (
        f"model {name}, context {NOT_MEASURED if context is None else f'{context:,}'} tokens; longer texts are beyond it",
        f"{families}, at most {MOST_QUESTIONS} a text, no calibration text among them; intervals are Wilson's, 95 %",
        f"{s.num_samples} calibration texts a length, {seeds}; influence `joint`, every answer alike",
        f"{e.device}, {e.dtype}, {e.threads} threads; moa {e.moa}, torch {e.torch}, transformers {e.transformers}",
        f"{datetime.now(UTC):%Y-%m-%d}, `{typed_command()}`",
    )


def page(rows: Rows, settings: ContextBench, conditions: Sequence[str]) -> str:
    """The page: conditions, then text, table and picture of each experiment."""
    asked = sorted(row.questions for row in rows)
    parts = ["# The effective context length", "\n".join(f"- {line}" for line in conditions)]
    parts += [f"A cell has {asked[0]} to {asked[-1]} questions. `recall.csv` has every plan by itself."]
    parts += [*_effective(rows, settings), *_search(rows, settings), *_carried(rows, settings)]
    return "\n\n".join(parts) + "\n"


def of(rows: Rows, experiment: str, method: str, budget: float | None = None, length: int | None = None) -> Rows:
    """Rows of one experiment, method, budget and length; None for any."""
    return [
        row
        for row in rows
        if (row.experiment, row.method) == (experiment, method)
        and budget in (None, row.budget)
        and length in (None, row.length_tokens)
    ]


def with_dense(rows: Rows, method: str, span_tokens: int) -> Rows:
    """A method's rows at one average span, and the dense model's up to there, where they are the same."""
    dense = [row for row in of(rows, EFFECTIVE, DENSE) if row.length_tokens <= span_tokens]
    return [*dense, *of(rows, EFFECTIVE, method, span_tokens)]


def _effective(rows: Rows, settings: ContextBench) -> Iterator[str]:
    profiled = ", ".join(f"{n:,}" for n in settings.profile_lengths)
    yield "## How long a text may get at equal average spans"
    yield (
        f"The longest text with {percent(RECALL_LEVEL)} recall at it and at every shorter length measured, and, in brackets, "
        "the first length measured that falls below. Spans are equal at each length: the uniform span (StreamingLLM) keeps "
        "just so many tokens in every head; a plan is made for each length from one profile, and the mean of its heads' "
        f"spans there is at most as many. The profile is of {profiled} tokens (seed {settings.seeds[0]}); plans for longer "
        "texts rest on it all the same. *Times* divides the plan's longest length by the first at which the uniform span "
        "fails, so it is never too large; *surely* does so with the ends of 95 % intervals. *At most* is the dense model's "
        "length in place of the plan's: no plan is expected beyond it."
    )
    yield table(
        ["average span", UNIFORM, PLAN, DENSE, "times", "surely", "at most"],
        [_effective_row(rows, span) for span in settings.spans_tokens],
    )
    yield "Recall, %:"
    methods = [(method, span) for span in settings.spans_tokens for method in (UNIFORM, PLAN)]
    lengths = sorted({row.length_tokens for row in rows if row.experiment == EFFECTIVE})
    yield table(
        ["tokens", DENSE, *(f"{method}, {span}" for method, span in methods)],
        [
            [
                f"{n:,}",
                _cell(of(rows, EFFECTIVE, DENSE, None, n)),
                *(_cell(of(rows, EFFECTIVE, m, s, n)) for m, s in methods),
            ]
            for n in lengths
        ],
    )
    yield "Up to the average span itself every plan is dense. ![recall by length](effective.png)"


def _effective_row(rows: Rows, span: int) -> list[str]:
    uniform, plan = (effective_context(with_dense(rows, method, span)) for method in (UNIFORM, PLAN))
    dense = effective_context(of(rows, EFFECTIVE, DENSE))
    cells = [_length(found) for found in (uniform, plan, dense)]
    ends = [(plan.tokens, uniform.lost_tokens), (plan.sure_tokens, uniform.surely_lost_tokens)]
    ends.append((dense.tokens, uniform.lost_tokens))
    return [f"{span:,}", *cells, *(NOT_MEASURED if first is None else f"{last / first:.1f}" for last, first in ends)]


def _length(found: Effective) -> str:
    return f"{found.tokens:,} ({NOT_MEASURED if found.lost_tokens is None else f'{found.lost_tokens:,}'})"


def _search(rows: Rows, settings: ContextBench) -> Iterator[str]:
    yield "## What each freedom of a plan is worth"
    yield (
        "Recall at one length, %, every plan made for just this length and density. `uniform`: one fixed span. `layers`: one "
        "fixed span per layer (`--no-elastic --per-layer`). `heads`: one per KV head (`--no-elastic`). `elastic`: every rule. "
        "Mean over calibration seeds with the interval of one seed's questions; where seeds differ, their range. The paper "
        "has, at 25 % and 8k tokens, 25, 31, 95 and 98 %."
    )
    for n in settings.search_lengths:
        seen = "profiled" if n in settings.profile_lengths else "not profiled"
        yield f"{n:,} tokens ({seen}); dense {_cell(of(rows, SEARCH, DENSE, None, n))}"
        yield table(
            ["density", UNIFORM, *SEARCHES],
            [
                [percent(d), *(_cell(of(rows, SEARCH, method, d, n)) for method in (UNIFORM, *SEARCHES))]
                for d in settings.densities
            ],
        )
    yield "![recall by density](search.png)"


def _carried(rows: Rows, settings: ContextBench) -> Iterator[str]:
    short = ", ".join(f"{n:,}" for n in settings.short_lengths)
    yield "## One plan for all lengths: does elasticity carry?"
    yield (
        f"Profiled at {short} tokens alone, the budget kept there and at {2 * settings.short_lengths[-1]:,}, asked up to "
        f"{settings.carried_lengths[-1]:,}. `{SHARE}`: one share of the length for every head. `{FIXED}`: fixed windows "
        "(`--no-elastic`), none of which is longer than the longest profiled text. `elastic`: every rule. "
        f"`{REPLANNED}`: fixed windows made anew for the very length, with the elastic plan's mean span there and from the "
        "same profile. Recall, %, *at* the mean span in tokens; over seeds as above."
    )
    methods = (SHARE, FIXED, "elastic", REPLANNED)
    for density in settings.carried_densities:
        yield f"Budget {percent(density)}"
        lines = []
        for n in settings.carried_lengths:
            cells = [_with_span(of(rows, CARRIED, method, density, n)) for method in methods]
            lines.append([f"{n:,}", _cell(of(rows, CARRIED, DENSE, None, n)), *cells])
        yield table(["tokens", DENSE, *methods], lines)
    yield "![recall by length](carried.png)"


def _cell(rows: Rows) -> str:
    """`97.1 [94.2, 98.6]`, and the seeds' range if they differ."""
    if not rows:
        return NOT_MEASURED
    mean, low, high = (100 * share for share in over_seeds(rows))
    shares = sorted(100 * row.accuracy_ratio for row in rows)
    spread = f"; {shares[0]:.0f} to {shares[-1]:.0f}" if shares[-1] - shares[0] >= 1 else ""
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]{spread}"


def _with_span(rows: Rows) -> str:
    if not rows:
        return NOT_MEASURED
    spans = sum(row.mean_span_tokens for row in rows) / len(rows)
    return f"{_cell(rows)} at {spans:.0f}"
