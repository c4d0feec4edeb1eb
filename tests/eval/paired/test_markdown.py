"""Markdown shows what it was given: read back by a parser, names are text and every table has its rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from moa.eval.markdown import code, escaped, table
from moa.eval.paired.markdown import to_markdown, to_text
from moa.eval.paired.view import View

PARSER = MarkdownIt("gfm-like", {"linkify": False})
HOSTILE = [
    "<script>alert(1)</script>",
    "a|b | c",
    "[click](javascript:alert(1))",
    "![x](http://192.0.2.1/x.png)",
    "*bold* _it_ `code` ~~gone~~",
    "&lt;b&gt; &#60;",
    "line\n# heading\n\n- item",
    "\\|\\",
    "</td></table>",
]


def said(text: str) -> tuple[str, set[str]]:
    """What a reader of Markdown sees, and of which kinds its parts are."""
    parts = [part for block in PARSER.parse(text) for part in (block.children or [])]
    shown = "".join("\n" if part.type == "softbreak" else part.content for part in parts)
    return shown, {part.type for part in parts}


@given(st.text(max_size=40))
def test_escaped_text_reads_as_it_was(text):
    shown, kinds = said("x" + escaped(text) + "x")
    assert kinds <= {"text", "text_special"}
    assert shown == "x" + "".join(letter if letter.isprintable() else " " for letter in text) + "x"


@given(st.text(max_size=40).filter(str.strip))
def test_code_reads_as_it_was(text):
    shown, kinds = said("x " + code(text) + " x")
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    assert "code_inline" in kinds
    assert shown in {f"x {line} x", f"x {line[1:-1]} x"}  # code loses a space at both its ends


@given(st.lists(st.text(max_size=20), min_size=2, max_size=4))
def test_tables_keep_their_columns(names):
    blocks = PARSER.parse(table(["a", *("b" for _ in names)], [["n", *map(escaped, names)]]))
    assert sum(block.type == "td_open" for block in blocks) == len(names) + 1
    assert sum(block.type == "tr_open" for block in blocks) == 2


def test_plain_names_and_numbers_are_not_touched():
    for text in ("moa_niah_single_1 (nll)", "-1.0 [-2.0, +0.5] ▼", "< 0.001", "acme/model-7B", "0–20 %"):
        assert escaped(text) == text


def test_hostile_names_stay_text(made_up):
    names = made_up(("dense", *HOSTILE[:4]), HOSTILE[4:], (64, None), model=HOSTILE[0], losses=(HOSTILE[1],), samples=4)
    text = to_markdown(View(names))
    blocks = PARSER.parse(text)
    kinds = {part.type for block in blocks for part in [block, *(block.children or [])]}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "s_open", "em_open"}
    shown = said(text)[0]
    for name in HOSTILE:
        assert " ".join(name.split("\n")) in shown
    headings = [blocks[i + 1].content for i, block in enumerate(blocks) if block.type == "heading_open"]
    assert "heading" not in headings


@pytest.mark.parametrize("lengths", [(1024, 4096), (None,), (2048, None)])
def test_a_table_for_each_length_and_task(lengths, made_up):
    view = View(made_up(lengths=lengths))
    blocks = PARSER.parse(to_markdown(view))
    headings = [
        blocks[i + 1].content for i, block in enumerate(blocks) if block.type == "heading_open" and block.tag == "h3"
    ]
    assert len(headings) == len(view.report.cells)
    tables = sum(block.type == "table_open" for block in blocks)
    glance, depths = 1 + any(lengths), 1
    assert tables == len(view.report.cells) + len(lengths) + glance + depths


def test_all_conditions_are_told(made_up):
    view = View(made_up())
    text, c = to_markdown(view), view.report.conditions
    for fact in (
        c.model_name, c.model_fingerprint[:16], c.tokenizer_sha256[:16], c.environment.device, c.environment.dtype,
        c.date, c.command, "seed 42", "random 7", "1,024, 4,096 tokens", *c.versions.values(), "kv v1", "window_tokens 256",
        "sdpa",
    ):  # fmt: skip
        assert fact in text


def test_a_terminal_gets_the_overviews(made_up):
    text = to_text(View(made_up()))
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Mean accuracy by length",
        "## KV bytes by length",
        "## 1,024 tokens",
        "## 4,096 tokens",
    ]
    assert "## Mean" not in to_text(View(made_up(lengths=(1024,))))
