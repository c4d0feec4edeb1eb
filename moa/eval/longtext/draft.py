"""What a family of long-context questions draws, before it is sized, counted and kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

Draw = Callable[["Wanted", random.Random, int], "Draft"]
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which sample is wanted.

    Args:
        length_tokens: of prompt and answer together, at most.
        index, count: the sample's number, and how many there are.
        seed: of the whole task; a sample's own random numbers come from it, the length and the index.
        options: of the task, such as a file of passages.
    """

    length_tokens: int
    index: int
    count: int
    seed: int
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """A question with its text.

    Args:
        input: the prompt.
        prefix: how the answer begins; the model goes on from there.
        outputs: what the answer must hold.
        depth_ratio: where in the text the evidence begins, 0 the start; None where it lies in many places.
    """

    input: str
    prefix: str
    outputs: tuple[str, ...]
    depth_ratio: float | None = None


class Make(Protocol):
    """Makes a family's documents for one tokenizer and length."""

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length_tokens: int,
        count: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> list[Document]:
        """The documents: `count` of them, as rows of text and numbers.

        Raises:
            DataError: the length is too short, or the tokenizer cannot write them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of question.

    Args:
        name: also the task's, after `moa_`.
        version: goes up with any change of the texts; part of the key they are kept under.
        make: makes its documents.
        answer_tokens: most tokens that the model writes; 0 where it writes none.
    """

    name: str
    version: int
    make: Make
    answer_tokens: int
