"""The page is one file: what it shows is in it, names are text, and nothing but its own style and script may run."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from moa.eval.paired.page import to_html
from moa.eval.paired.pictures import Picture, pictures
from moa.eval.paired.view import View

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "</style></script><b>{{ 7 * 7 }}{% raw %}",
    "&amp;<!--",
]
PIXEL = Picture("pixel", HOSTILE[1], base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="))  # fmt: skip


class Reader(HTMLParser):
    """Elements, their attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def hostile(made_up):
    return made_up(("dense", *HOSTILE[:3]), HOSTILE[2:], (64, None), model=HOSTILE[0], losses=(HOSTILE[1],), samples=4)


def test_hostile_names_stay_text(hostile, made_up):
    page, tame = Reader(to_html(View(hostile), [PIXEL])), Reader(to_html(View(made_up(lengths=(64, None))), [PIXEL]))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in tame.elements}
    assert [sum(tag == kind for tag, _ in page.elements) for kind in ("script", "style", "img")] == [1, 1, 1]
    allowed = {"class", "id", "href", "data-value", "src", "alt", "width", "height", "lang", "charset", "http-equiv"}
    allowed |= {"content", "name", "rel", "scope", "role", "aria-label"}
    assert {name for _, attributes in page.elements for name in attributes} <= allowed
    text = "".join(page.texts)
    for name in HOSTILE:
        assert name in text
    assert next(attributes["alt"] for tag, attributes in page.elements if tag == "img") == HOSTILE[1]


def test_nothing_lies_outside(hostile):
    page = Reader(to_html(View(hostile), [PIXEL]))
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    ids = {attributes.get("id") for _, attributes in page.elements}
    links = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    assert links <= ids


def test_browsers_run_its_own_script_alone(hostile):
    page = to_html(View(hostile))
    policy = next(a["content"] for t, a in Reader(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        (inside,) = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_pictures_are_inside_in_full(made_up):
    view = View(made_up())
    drawn = list(pictures(view))
    sources = [a["src"] for t, a in Reader(to_html(view, drawn)).elements if t == "img"]
    assert [base64.b64decode(source.split(",")[1]) for source in sources] == [picture.png for picture in drawn]


def test_all_conditions_and_problems_are_told(made_up):
    report = made_up()
    limited = report.model_copy(update={"conditions": report.conditions.model_copy(update={"smoke_test": True})})
    text, c = "".join(Reader(to_html(View(limited))).texts), report.conditions
    for fact in (
        c.model_name, c.model_fingerprint[:16], c.environment.device, c.environment.dtype, c.date, c.command, "seed 42",
        "random 7", *c.versions.values(), "kv v1", "window_tokens 256", "Smoke test: --limit leaves out samples",
        "accuracy only: keys are hidden",
    ):  # fmt: skip
        assert fact in text


@pytest.mark.parametrize("variants", [("dense",), ("dense", "moa"), tuple("dense a b c d e f g h".split())])
@pytest.mark.parametrize("lengths", [(1024,), (None,), (1, 2, 3, 4, 5, None)])
def test_every_table_is_there(variants, lengths, made_up):
    view = View(made_up(variants, lengths=lengths, samples=3))
    tables = sum(tag == "table" for tag, _ in Reader(to_html(view)).elements)
    assert tables == len(view.report.cells) + len(lengths) + 1 + any(lengths) + 1
