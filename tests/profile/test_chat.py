"""Chat templates: applied where there is one, the same text every day, contents found where they stand."""

from __future__ import annotations

import re

import pytest

from moa.demo.tokenizer import build_tokenizer
from moa.errors import DataError, UsageError
from moa.profile.chat import Chat

TURNS = [("system", "be brief"), ("user", " the dog "), ("assistant", "the cat"), ("user", "the dog")]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}.{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat(template: str = TEMPLATE, wanted: str = "auto") -> Chat:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template or None
    return Chat.of(tokenizer, wanted)


def test_a_template_is_applied_where_there_is_one() -> None:
    assert chat().template == chat(wanted="on").template == TEMPLATE
    assert chat(wanted="off").template == chat("").template == ""
    with pytest.raises(UsageError, match="the tokenizer has none"):
        chat("", "on")
    assert re.fullmatch("[0-9a-f]{64}", chat().sha256)
    assert chat().sha256 != chat(TEMPLATE + " ").sha256
    assert chat("").sha256 == ""


def test_turns_are_found_in_what_the_template_writes() -> None:
    text, places = chat().write(TURNS, ask=True)
    assert text == "[system]be brief.[user]the dog.[assistant]the cat.[user]the dog.[assistant]"
    assert [text[p.start : p.stop] for p in places] == ["be brief", "the dog", "the cat", "the dog"]
    assert [p.start for p in places] == sorted(p.start for p in places)
    assert chat().write(TURNS, ask=False)[0] == text.removesuffix("[assistant]")


def test_without_a_template_turns_are_paragraphs() -> None:
    text, places = chat("").write(TURNS, ask=True)
    assert text == "be brief\n\nthe dog\n\nthe cat\n\nthe dog"
    assert [text[p.start : p.stop] for p in places] == ["be brief", "the dog", "the cat", "the dog"]


def test_a_template_brings_its_own_special_tokens() -> None:
    bos = build_tokenizer().bos_token_id
    assert chat("").encode("the dog")[0][0] == bos
    assert bos not in chat().encode("the dog")[0]
    assert chat().encode("<bos> the dog")[0].count(bos) == 1


def test_a_template_that_writes_the_date_gives_the_same_text_every_day() -> None:
    at_top = "{{ strftime_now('%d %b %Y') }} " + TEMPLATE
    in_macro = "{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}{{ today() }} " + TEMPLATE
    guarded = "{% if strftime_now is defined %}{% set d = strftime_now('%Y') %}{% endif %}{{ d }} " + TEMPLATE
    for template in (at_top, in_macro, guarded):
        assert chat(template).write(TURNS[1:2], ask=True)[0] == "2024-07-26 [user]the dog.[assistant]"


def test_templates_that_cannot_write_a_row() -> None:
    refusing = "{{ raise_exception('only user and assistant, in turns') }}"
    with pytest.raises(DataError, match=r"refuses a conversation of system, user, .*only user.*--chat-template off"):
        chat(refusing).write(TURNS, ask=True)
    with pytest.raises(DataError, match="does not write a turn as it is"):
        chat("{{ messages[0]['content'] | upper }}").write(TURNS, ask=True)
