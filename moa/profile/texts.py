"""Rows of a data set as calibration texts of a length: tokenised, and cut where they do not fit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from moa.errors import DataError
from moa.profile.chat import Chat
from moa.profile.data import TextSample
from moa.profile.dataset import Row


@dataclass(frozen=True, slots=True)
class Fitting:
    """What a text must fit.

    Args:
        n_tokens: the length; a text is longer than half of it, so one length's texts differ in length.
        reference: whether the data's answers are kept; else room is left for the model's.
        max_answer_tokens: that room, and the share of a plain text's end that counts as its answer.
    """

    n_tokens: int
    reference: bool
    max_answer_tokens: int


def row_samples(
    rows: Sequence[Row], chat: Chat, fitting: Fitting, count: int, seed: int, source: str
) -> tuple[TextSample, ...]:
    """Up to `count` rows for one length, in seeded order: whole ones first, then such as had to be cut.

    The middle of a prompt's context is cut, the left of a plain text: never what the template or the tokenizer puts
    first, and never the question. `truncated_tokens` says how much.

    Raises:
        DataError: no row is long enough, or a chat template cannot write one.
    """
    whole, cut = list[TextSample](), list[TextSample]()
    for i in random.Random(f"{seed}-{fitting.n_tokens}").sample(range(len(rows)), len(rows)):
        sample = _fitted(rows[i], chat, fitting)
        if sample is not None:
            (cut if sample.truncated_tokens else whole).append(sample)
        if len(whole) == count:
            break
    if not (whole or cut):
        raise DataError(
            f"{source}: no sample is longer than {fitting.n_tokens // 2} tokens with an answer that leaves room for its "
            f"prompt, so none can calibrate length {fitting.n_tokens}; use shorter --lengths or longer texts"
        )
    return tuple((whole + cut)[:count])


def _fitted(row: Row, chat: Chat, fitting: Fitting) -> TextSample | None:
    """The row's text, cut where needed; None where it is too short, or nothing may be cut that would make it fit."""
    ids, cuttable = _tokenized(row, chat)
    reference = fitting.reference and not row.plain
    answer = _answer_ids(row, chat) if reference else []
    reserved = len(answer) if answer else fitting.max_answer_tokens
    if row.plain and fitting.reference:
        reserved = 0
    excess = max(0, len(ids) + reserved - fitting.n_tokens)
    length = len(ids) + reserved - excess
    if length <= fitting.n_tokens // 2 or excess >= len(cuttable):
        return None
    first = cuttable.start + (0 if row.plain else (len(cuttable) - excess) // 2)
    prompt = ids[:first] + ids[first + excess :]
    if row.plain and fitting.reference:
        answer = prompt[-min(fitting.max_answer_tokens, len(prompt) // 2) :]
        prompt = prompt[: -len(answer)]
    positions = range(len(prompt), len(prompt) + len(answer))
    return TextSample((*prompt, *answer), tuple(positions), tuple(answer), excess)


def _tokenized(row: Row, chat: Chat) -> tuple[list[int], range]:
    """Tokens up to the answer, and which of them may be cut."""
    if row.plain:
        chat = Chat(chat.tokenizer)  # a running text has no turns
    text, places = chat.write(row.turns, ask=True)
    where = places[-1] if row.context else max(places, key=len)
    if row.context:
        where = range(where.start, where.start + len(row.context.strip()))
    ids, offsets = chat.encode(text)
    inside = [i for i, (begin, end) in enumerate(offsets) if where.start <= begin < end <= where.stop]
    return ids, range(inside[0], inside[-1] + 1) if inside else range(0)


def _answer_ids(row: Row, chat: Chat) -> list[int]:
    if row.answer is None:
        return []
    return list(chat.tokenizer(row.answer, add_special_tokens=False, verbose=False)["input_ids"])
