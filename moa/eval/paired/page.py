"""A paired evaluation as one HTML file that needs nothing beside it: no network, no folder of pictures."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moa.eval.figures import DPI
from moa.eval.paired import tables
from moa.eval.paired.facts import HEADLINE, conditions, variant_facts
from moa.eval.paired.pictures import Picture
from moa.eval.paired.view import View

TEMPLATES = Path(__file__).parent / "template"


def to_html(view: View, pictures: Sequence[Picture] = ()) -> str:
    """The page. All names are escaped, and browsers are told to run and load nothing but what is in it."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    facts = conditions(view.report)
    return environment.get_template("page.html.jinja").render(
        title=f"{view.report.conditions.model_name}: evaluation",
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        headline=[facts[name] for name in HEADLINE],
        problems=view.report.problems(),
        facts={**facts, "command": view.report.conditions.command},
        variants={variant.name: variant_facts(variant) for variant in view.report.variants},
        glances=[table for table in (tables.glance(view), tables.kv_bytes(view)) if table],
        pictures=[(picture, _data_url(picture), *_size(picture)) for picture in pictures],
        lengths=[(tables.overview(view, n), [tables.detail(view, c) for c in view.cells(n)]) for n in view.lengths],
        depths=tables.depths(view),
        notes=tables.notes(view),
        depths_note=tables.DEPTHS,
    )


def _digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _data_url(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _size(picture: Picture) -> tuple[int, int]:
    """Width and height on the page, where an inch is 96 pixels; a PNG says its own in its first bytes."""
    width, height = int.from_bytes(picture.png[16:20]), int.from_bytes(picture.png[20:24])
    return width * 96 // DPI, height * 96 // DPI
