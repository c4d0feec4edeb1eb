"""Recall questions in the language of the model that ships, one document each; the texts are those of `moa demo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count as counting
from typing import Any

from transformers import PreTrainedTokenizerBase

from moa.demo import language
from moa.eval.longtext.draft import Document
from moa.eval.longtext.sized import tokens
from moa.eval.recall import fitted_text
from moa.eval.records import RecallTask
from moa.profile.wording import Wording


@dataclass(frozen=True, slots=True)
class DemoRecall:
    """Makes documents of one family of the language; see `Make`."""

    family: language.Family

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length_tokens: int,
        count: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> list[Document]:
        wording, documents = Wording.of(tokenizer), list[Document]()
        for text in counting():
            task = RecallTask(seed=seed)
            sample = fitted_text(tokenizer, length_tokens, self.family, task.questions_per_text, seed, text)[0]
            written, places = wording.write(sample.words[1:])  # without <bos>, which the tokenizer adds
            for asked in sample.questions:
                begin, end = places[asked.start - 2].stop, places[asked.stop - 2].stop
                documents.append(
                    {
                        "index": len(documents),
                        "text": text,
                        "input": written[:begin],
                        "target": written[begin:end],
                        "length": tokens(tokenizer, written[:end]),
                        "max_length": length_tokens,
                        "depth_ratio": asked.depth_ratio,
                    }
                )
            if len(documents) >= count:
                break
        return documents[:count]
