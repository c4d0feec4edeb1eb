"""Chat templates: applied where there is one, the same text every day, contents found where they stand."""

from __future__ import annotations

import re

import pytest

from moa.demo.tokenizer import build_tokenizer
from moa.errors import DataError, UsageError
from moa.profile.chat import Chat
from moa.profile.synthetic import synthetic_samples

TURNS = [("system", "be brief"), ("user", " the dog "), ("assistant", "the cat"), ("user", "the dog")]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}.{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


# The habits of templates in the wild: a system turn of their own, roles renamed, strict turns, an empty thought, a date.
STYLES = {
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "headers": (
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "<|start|>system<|end|>\n\nToday: {{ date_string }}<|eot|>{% for m in messages %}"
        "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
    ),
    "instructions": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
        "{% endfor %}"
    ),
    "turns": (
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}


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


@pytest.mark.parametrize("style", STYLES)
def test_templates_as_they_are_found_write_conversations(style) -> None:
    turns = [*TURNS[1:], ("assistant", "10 .")]
    text, places = chat(STYLES[style]).write(turns, ask=False)
    assert [text[p.start : p.stop] for p in places] == ["the dog", "the cat", "the dog", "10 ."]
    assert chat(STYLES[style]).write(turns, ask=False) == (text, places)
    asked, _ = chat(STYLES[style]).write(turns[:1], ask=True)
    assert asked == text[: len(asked)] or "<think>" in asked  # an answer stands where the question leaves off
    assert asked.index("the dog") == text.index("the dog")
    samples = synthetic_samples(build_tokenizer(), 256, 3, seed=0, chat=chat(STYLES[style]))
    assert [len(sample.token_ids) for sample in samples] == [256] * 3
