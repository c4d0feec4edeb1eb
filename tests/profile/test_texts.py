"""Rows at a length: what is cut, what never is, and which rows are taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from moa.demo import language
from moa.demo.tokenizer import build_tokenizer
from moa.errors import DataError
from moa.profile.chat import Chat
from moa.profile.dataset import Row
from moa.profile.texts import Fitting, row_samples

ANSWER_TOKENS = 16
# Words of the language only, so that each is one token; the end of a turn is a turn's own mark.
TEMPLATE = (
    "<bos> {% for m in messages %}question : {{ m['content'] }} .{% endfor %}"
    "{% if add_generation_prompt %} said : {% endif %}"
)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def said(n: int, first: int = 0) -> str:
    """`n` different words, as far as there are that many."""
    return " ".join(language.KEYS[(first + i) % 128] for i in range(n))


def row(prompt: int, answer: int | None = 2) -> Row:
    """Words in the prompt and in the answer."""
    return Row((("user", said(prompt)),), None if answer is None else " ".join(["10"] * answer))


def take(tokenizer, rows, n_tokens=64, count=10, seed=0, reference=True, template=""):
    chat = Chat(tokenizer, template)
    return row_samples(rows, chat, Fitting(n_tokens, reference, ANSWER_TOKENS), count, seed, "file")


def test_a_long_prompt_loses_its_middle(words) -> None:
    (sample,) = take(words, [row(100)])
    whole = words(said(100))["input_ids"]
    assert sample.token_ids == (*whole[:31], *whole[-31:], *[words.get_vocab()["10"]] * 2)
    assert sample.truncated_tokens == 101 - 62
    assert sample.answer_positions == (62, 63)
    (short,) = take(words, [row(40)])
    assert (len(short.token_ids), short.truncated_tokens) == (43, 0)


def test_only_the_context_is_cut_where_it_is_given(words) -> None:
    question = said(20, 100)
    given_ = Row((("user", f"{said(90)}\n\n{question}"),), "10", said(90))
    (sample,) = take(words, [given_])
    assert len(sample.token_ids) == 64
    text = words.decode(sample.token_ids)
    assert text.endswith(f"{question} 10")
    assert text.startswith(f"<bos> {said(20)}")
    assert sample.truncated_tokens == 1 + 90 + 20 + 1 - 64
    with pytest.raises(DataError, match="no sample"):
        take(words, [Row((("user", f"{said(3)}\n\n{said(90)}"),), "10", said(3))])


@pytest.mark.parametrize("reference", [True, False])
def test_the_template_s_head_and_the_question_s_end_stay(words, reference) -> None:
    (sample,) = take(words, [row(100)], template=TEMPLATE, reference=reference)
    text = words.decode(sample.token_ids)
    assert text.startswith(f"<bos> question : {said(10)}")
    prompt = text.removesuffix(" 10 10") if reference else text
    assert prompt.endswith(f"{said(10, 90)} . said :")
    assert len(sample.token_ids) == (64 if reference else 64 - ANSWER_TOKENS)


def test_of_many_turns_the_longest_is_cut(words) -> None:
    turns = (("system", said(8)), ("user", said(90, 10)), ("assistant", said(5)), ("user", said(7, 60)))
    (sample,) = take(words, [Row(turns, "10")], template=TEMPLATE)
    text = words.decode(sample.token_ids)
    assert text.startswith(f"<bos> question : {said(8)} .question") or said(8) in text
    assert f"{said(7, 60)} . said : 10" in text
    assert said(90, 10) not in text
    assert len(sample.token_ids) == 64


def test_plain_texts_lose_their_left_and_answer_at_their_end(words) -> None:
    text = Row((("", said(100)),))
    whole = words(said(100))["input_ids"]
    for template in ("", TEMPLATE):  # a running text is no conversation
        (sample,) = take(words, [text], template=template)
        assert sample.token_ids == (whole[0], *whole[-63:])
        assert sample.answer_positions == tuple(range(64 - ANSWER_TOKENS, 64))
        assert sample.answer_ids == sample.token_ids[-ANSWER_TOKENS:]
        assert sample.truncated_tokens == 101 - 64
    (prompt,) = take(words, [text], reference=False)
    assert prompt.token_ids == (whole[0], *whole[-(63 - ANSWER_TOKENS) :])
    assert prompt.answer_positions == ()


def test_the_data_s_answers_are_left_out_where_the_model_s_count(words) -> None:
    (sample,) = take(words, [row(45, 2)], reference=False)
    assert sample.answer_positions == ()
    assert words.decode(sample.token_ids) == f"<bos> {said(45)}"


@given(
    prompt=st.integers(1, 200),
    answer=st.none() | st.integers(1, 100),
    n_tokens=st.sampled_from([64, 65, 128]),
    reference=st.booleans(),
    template=st.sampled_from(["", TEMPLATE]),
)
@settings(max_examples=80)
def test_a_sample_never_exceeds_its_length(words, prompt, answer, n_tokens, reference, template) -> None:
    around = 1 if not template else 6  # <bos>, and `question : ... . said :`
    answered = reference and answer is not None
    try:
        (sample,) = take(words, [row(prompt, answer)], n_tokens, reference=reference, template=template)
    except DataError:
        needed = around + (answer if answered else ANSWER_TOKENS)
        assert prompt + needed <= n_tokens // 2 or needed >= n_tokens
        return
    written = 0 if answered else ANSWER_TOKENS
    assert n_tokens // 2 < len(sample.token_ids) + written <= n_tokens
    assert all(p >= 1 for p in sample.answer_positions)
    assert len(sample.token_ids) + sample.truncated_tokens == prompt + around + (answer if answered else 0)


def test_short_texts_are_left_out(words) -> None:
    rows = [row(5), row(60), row(10), row(61)]
    assert len(take(words, rows)) == 2
    assert len(take(words, rows, count=1)) == 1
    with pytest.raises(DataError, match=r"file: no sample is longer than 32 tokens"):
        take(words, [row(5)])
    with pytest.raises(DataError, match="leaves room for its prompt"):
        take(words, [row(5, 64)])


def test_whole_texts_are_taken_before_cut_ones(words) -> None:
    rows = [row(100 + i) for i in range(20)] + [row(40), row(45)]
    taken = take(words, rows, count=5)
    assert [sample.truncated_tokens > 0 for sample in taken] == [False, False, True, True, True]


def test_which_rows_are_taken_depends_on_the_seed_alone(words) -> None:
    rows = [row(40 + i) for i in range(20)]
    assert take(words, rows, count=5) == take(words, rows, count=5)
    assert take(words, rows, count=5) != take(words, rows, count=5, seed=1)
    assert len({s.token_ids for s in take(words, rows, count=20)}) == 20
