"""A report as text: tables that read well in a pager as well as on a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from moa.eval.labels import interval, percent, result_label, spread
from moa.eval.records import MethodResult, ParetoPoint, Report, Score, Speed
from moa.units import human_bytes

NOT_MEASURED = "–"
_MARKUP = re.compile(r"[\\`*~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")


def to_markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The whole report; `pictures` are file names beside it."""
    parts = [f"# {report.title}", *_conditions(report), *_accuracy(report), *_families(report), *_depths(report)]
    parts += [*_perplexities(report), *_plans(report), *_speed(report), *_pareto(report), *_pictures(pictures)]
    return "\n\n".join(parts) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns; all but the first stand to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = [("-" * width if not i else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    lines = [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text from outside on one line that shows as it is: no emphasis, no HTML, no link to anything but what is read.

    What means nothing in its place stays unescaped, for people read the source: underscores within words, brackets that no
    link follows, `p < 0.001`. Bars are for `table` to see to.
    """
    return re.sub(_MARKUP, r"\\\g<0>", _one_line(text))


def code(text: str) -> str:
    """Text from outside as code, whatever backticks are in it."""
    line = _one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _one_line(text: str) -> str:
    """Without line breaks, and without marks that turn the direction of writing."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _conditions(report: Report) -> Iterator[str]:
    c, e = report.conditions, report.conditions.environment
    facts = {
        "model": f"{c.model_name} ({c.architecture}, {c.parameters:,} parameters)",
        "fingerprint": c.model_fingerprint[:16],
        "device": f"{e.device}, {e.dtype}, {e.threads} thread{'s' if e.threads > 1 else ''}",
        "versions": f"moa {e.moa}, torch {e.torch}, transformers {e.transformers}, Python {e.python}",
        "date": c.date,
        "command": f"`{c.command}`",
    }
    if c.task:
        facts["questions"] = (
            f"seed {c.task.seed}; families {', '.join(c.task.families)}; {c.task.forwards_per_length} texts per length; "
            f"at most {c.task.questions_per_text} questions per text, one in `single` texts"
        )
    yield "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _accuracy(report: Report) -> Iterator[str]:
    lengths = report.recall_lengths_tokens
    if not lengths:
        return
    rows = [
        [result_label(result), *(_score(r.overall if (r := result.recall_at(n)) else None) for n in lengths)]
        for result in report.results
        if result.recall
    ]
    yield "## Recall accuracy"
    yield (
        "Share of questions answered right in full, with Wilson 95 % intervals. An answer is right when each of its tokens "
        "is the model's first choice given the true text before it, which is when greedy decoding writes it."
    )
    yield table(["", *(f"{n:,} tokens" for n in lengths)], rows)
    yield "Questions per cell: " + ", ".join(f"{_questions(report, n)} at {n:,}" for n in lengths) + "."


def _questions(report: Report, length_tokens: int) -> int:
    return max(r.overall.questions for result in report.results if (r := result.recall_at(length_tokens)))


def _score(score: Score | None) -> str:
    return interval(score) if score else NOT_MEASURED


def _families(report: Report) -> Iterator[str]:
    names = list(dict.fromkeys(f.family for result in report.results for r in result.recall for f in r.families))
    if len(names) < 2:
        return
    yield "## By family"
    for n in report.recall_lengths_tokens:
        rows = []
        for result in report.results:
            if at := result.recall_at(n):
                scores = {f.family: f.score for f in at.families}
                rows.append([result_label(result), *(_score(scores.get(name)) for name in names)])
        yield table([f"{n:,} tokens", *names], rows)


def _depths(report: Report) -> Iterator[str]:
    if report.recall_lengths_tokens:
        yield "## By depth of the fact"
        yield "Where the fact begins; 0 % is the beginning of the text. Of a chain, the earlier of its two sentences counts."
    for n in report.recall_lengths_tokens:
        found = [(result, at) for result in report.results if (at := result.recall_at(n))]
        bounds = sorted({(d.from_ratio, d.to_ratio) for _, at in found for d in at.depths})
        rows = []
        for result, at in found:
            scores = {(d.from_ratio, d.to_ratio): d.score for d in at.depths}
            rows.append([result_label(result), *(_score(scores.get(bound)) for bound in bounds)])
        yield table([f"{n:,} tokens", *(f"{a * 100:.0f}–{b * 100:.0f} %" for a, b in bounds)], rows)


def _perplexities(report: Report) -> Iterator[str]:
    def answers(result: MethodResult, n: int) -> str | None:
        at = result.recall_at(n)
        return f"{at.overall.answer_perplexity:.3f}" if at else None

    def plain(result: MethodResult, n: int) -> str | None:
        at = result.perplexity_at(n)
        return f"{at.perplexity:.3f}" if at else None

    if report.recall_lengths_tokens:
        yield "## Perplexity of answers"
        yield _by_length(report, report.recall_lengths_tokens, answers)
    measured = [p for result in report.results for p in result.perplexity]
    if measured:
        yield "## Perplexity of plain text"
        yield (
            f"The last {max(p.scored_tokens for p in measured):,} tokens at most of {measured[0].texts} texts per length, "
            f"seed {measured[0].seed}."
        )
        yield _by_length(report, sorted({p.length_tokens for p in measured}), plain)


def _by_length(report: Report, lengths: Sequence[int], cell: Callable[[MethodResult, int], str | None]) -> str:
    rows = [[result_label(r), *(cell(r, n) or NOT_MEASURED for n in lengths)] for r in report.results]
    kept = [row for row in rows if any(value != NOT_MEASURED for value in row[1:])]
    return table(["", *(f"{n:,} tokens" for n in lengths)], kept)


def _plans(report: Report) -> Iterator[str]:
    with_plan = [(result, result.plan) for result in report.methods if result.plan]
    if not with_plan:
        return
    lengths = sorted({at.length_tokens for _, plan in with_plan for at in plan.lengths})
    rows = []
    for result, plan in with_plan:
        costs = {at.length_tokens: at for at in plan.lengths}
        cells = [
            f"{percent(costs[n].density_ratio)}, {human_bytes(costs[n].kv_bytes_per_token * n)}"
            if n in costs
            else NOT_MEASURED
            for n in lengths
        ]
        rows.append([result_label(result), *cells, str(plan.distinct_rules), result.backend, plan.sha256[:12]])
    yield "## Plans"
    yield "Density and KV bytes of one sequence, computed from the spans; measured bytes stand under Speed."
    yield table(["", *(f"{n:,} tokens" for n in lengths), "rules", "backend", "plan sha256"], rows)


def _speed(report: Report) -> Iterator[str]:
    if not report.speed:
        return
    yield "## Speed and KV memory"
    yield (
        "Medians, with least and greatest in brackets; dense and plan in turns of one run. KV bytes are what the caches "
        "have allocated at the end."
    )
    yield from (_speed_table(report, speed) for speed in report.speed)


def _speed_table(report: Report, speed: Speed) -> str:
    e = speed.environment
    sides = [("dense", speed.dense), (f"{_plan_label(report, speed.plan_sha256)}", speed.sparse)]
    rows = [
        [
            f"{label} ({side.attention})",
            human_bytes(side.kv_bytes),
            spread(side.prefill_s),
            spread(side.decode_tokens_per_s),
        ]
        for label, side in sides
    ]
    rows.append(
        [
            "plan / dense",
            percent(speed.kv_bytes_ratio),
            f"{1 / speed.prefill_speedup_ratio:.2f} x",
            f"{speed.decode_speedup_ratio:.2f} x",
        ]
    )
    caption = (
        f"{speed.length_tokens:,} tokens: {speed.prompt_tokens:,} prefilled, {speed.decode_tokens} decoded; density "
        f"{percent(speed.density_ratio)}; {speed.rounds} rounds after a warm-up; {e.device}, {e.dtype}, {e.threads} "
        f"thread{'s' if e.threads > 1 else ''}; plan {speed.plan_sha256[:12]}."
    )
    return caption + "\n\n" + table(["", "KV bytes", "prefill s", "decode tokens/s"], rows)


def _plan_label(report: Report, sha256: str) -> str:
    return next((result_label(r) for r in report.methods if r.plan and r.plan.sha256 == sha256), f"plan {sha256[:12]}")


def _pareto(report: Report) -> Iterator[str]:
    if not report.pareto:
        return
    lengths = sorted({at.length_tokens for point in report.pareto for at in point.losses})
    yield "## Trade-offs between lengths"
    yield table(
        ["candidate", "density", *(f"predicted loss at {n:,}" for n in lengths), "true loss", "chosen"],
        [_pareto_row(i, point, lengths) for i, point in enumerate(report.pareto, 1)],
    )


def _pareto_row(i: int, point: ParetoPoint, lengths: Sequence[int]) -> list[str]:
    losses = {at.length_tokens: f"{at.loss:.4g}" for at in point.losses}
    true_loss = NOT_MEASURED if point.validation_loss is None else f"{point.validation_loss:.4g}"
    predicted = [losses.get(n, NOT_MEASURED) for n in lengths]
    return [point.label or str(i), percent(point.density_ratio), *predicted, true_loss, "yes" if point.chosen else ""]


def _pictures(names: Sequence[str]) -> Iterator[str]:
    if names:
        yield "## Pictures"
        yield from (f"![{name.removesuffix('.png')}]({name})" for name in names)
