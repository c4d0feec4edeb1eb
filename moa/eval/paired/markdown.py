"""A paired evaluation as Markdown that reads well in a pager, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from moa.eval import markdown
from moa.eval.markdown import code, escaped
from moa.eval.paired import tables
from moa.eval.paired.facts import conditions, variant_facts
from moa.eval.paired.pictures import Picture
from moa.eval.paired.tables import Row, Table
from moa.eval.paired.view import View


def to_markdown(view: View, pictures: Sequence[Picture] = ()) -> str:
    """Problems, conditions, a glance, pictures, a table per length, a table per length and task, and depths."""
    parts = [f"# {escaped(view.report.conditions.model_name)}: evaluation", *_problems(view), *_conditions(view)]
    parts += [*_glance(view), *_pictures(pictures), *_lengths(view), *_depths(view)]
    return "\n\n".join(parts) + "\n"


def to_text(view: View) -> str:
    """What a terminal shows: means and KV bytes by length where there are several, and all tasks at each length."""
    found = [tables.glance(view), tables.kv_bytes(view)] if len(view.lengths) > 1 else []
    every = [*found, *(tables.overview(view, length) for length in view.lengths)]
    parts = [f"## {table.title[0].upper()}{table.title[1:]}\n\n{_table(table)}" for table in every if table]
    return "\n\n".join([*parts, *tables.notes(view, details=False)])


def _problems(view: View) -> Iterator[str]:
    yield from (f"**{escaped(problem[0].upper() + problem[1:])}.**" for problem in view.report.problems())


def _conditions(view: View) -> Iterator[str]:
    facts = [f"- {name}: {escaped(value)}" for name, value in conditions(view.report).items()]
    yield "\n".join([*facts, f"- command: {code(view.report.conditions.command)}"])
    yield "\n".join(f"- {code(variant.name)}: {escaped(variant_facts(variant))}" for variant in view.report.variants)


def _glance(view: View) -> Iterator[str]:
    found = [table for table in (tables.glance(view), tables.kv_bytes(view)) if table]
    if found:
        yield "## At a glance"
        for table in found:
            yield f"**{table.title}**"
            yield _table(table)
        yield from tables.notes(view)


def _pictures(pictures: Iterable[Picture]) -> Iterator[str]:
    for picture in pictures:
        yield f"![{picture.name.replace('_', ' ')}]({picture.name}.png)"
        yield f"*{escaped(picture.caption)}*"


def _lengths(view: View) -> Iterator[str]:
    for length in view.lengths:
        overview = tables.overview(view, length)
        yield f"## {overview.title[0].upper()}{overview.title[1:]}"
        yield _table(overview)
        for cell in view.cells(length):
            detail = tables.detail(view, cell)
            yield f"### {escaped(detail.title)}"
            yield _table(detail)


def _depths(view: View) -> Iterator[str]:
    if table := tables.depths(view):
        yield f"## {table.title}"
        yield tables.DEPTHS
        yield _table(table)


def _table(table: Table) -> str:
    def line(row: Row) -> list[str]:
        return [escaped(entry.marked) for entry in row]

    return markdown.table(
        [escaped(heading) for heading in table.headings], [*map(line, table.rows), *map(line, table.foot)]
    )
