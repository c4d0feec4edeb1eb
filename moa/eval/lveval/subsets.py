"""LV-Eval's eleven data sets: what is asked, in which words, how long an answer may be, and how it is scored.

Questions and answer lengths are those of its own `config.py` (github.com/infinigence/LVEval, MIT licence;
arXiv 2402.05136), word for word, since scores are comparable only so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moa.errors import UsageError, closest

LEVELS = ("16k", "32k", "64k", "128k", "256k")
Language = Literal["en", "zh"]
Metric = Literal["f1", "f1_keywords", "rouge_l"]

_ONLY_THE_ANSWER = "Only give me the answer and do not output any other explanation and evidence."
_HOTPOT = (
    "{begin} Questions and answers are only relevant to some passages. {only}\n\nArticle: {{context}}\n\n"
    "{end} Questions and answers are only relevant to some passages. {only}\n\nQuestion: {{input}}\nAnswer:"
).format(
    begin="Answer the question based on the given passages.",
    end="Please answer the following question based on the above passages.",
    only=_ONLY_THE_ANSWER,
)
_ONE_PASSAGE = (
    "{begin} Questions and answers are only relevant to one passage. {only}\n\nArticle: {{context}}\n\n"
    "{end} Questions and answers are only relevant to one passage. {only}\n\nQuestion: {{input}}\nAnswer:"
).format(
    begin="Please answer the following question based on the given passages.",
    end="Please answer the following question based on the above passages.",
    only=_ONLY_THE_ANSWER,
)
_FACTS = (
    "Please answer the following questions based on the given article.\n\nArticle: {context}\n\n"
    "Please answer the following questions based on the above article.\n\nQuestion: {input}\nAnswer:"
)
_ONE_PASSAGE_ZH = (
    "请阅读以下文章并用中文回答问题，问题和答案只与其中一篇文章有关。只需要直接给出问题的答案，不要输出其他任何解释和证据。\n\n"
    "文章：{context}\n\n请基于上面的文章回答下面的问题，问题和答案只与其中一篇文章有关。"
    "只需要直接给出问题的答案，不要输出其他任何解释和证据。\n\n问题：{input}\n回答："
)
_FACTS_ZH = (
    "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n现在请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："
)
_MIXED_ZH = (
    "请根据下面给定的文章回答问题，问题和答案只与其中一篇文章有关。\n\n文章：{context}\n\n"
    "现在请基于上述文章回答下面的问题，问题和答案只与其中一篇文章有关。\n\n问题：{input}\n回答："
)
_LIC = _MIXED_ZH.replace("现在请基于", "请现在基于")


@dataclass(frozen=True, slots=True)
class Subset:
    """One data set.

    Args:
        question: with places for `{context}` and `{input}`.
        answer_tokens: most that a model may write.
    """

    name: str
    language: Language
    metric: Metric
    question: str
    answer_tokens: int = 64

    def prompt(self, context: str, asked: str) -> str:
        """What the model reads."""
        return self.question.format(context=context, input=asked)


_ALL = (
    Subset("hotpotwikiqa_mixup", "en", "f1_keywords", _HOTPOT),
    Subset("loogle_SD_mixup", "en", "f1_keywords", _ONE_PASSAGE),
    Subset("loogle_CR_mixup", "en", "f1_keywords", _ONE_PASSAGE),
    Subset("loogle_MIR_mixup", "en", "f1_keywords", _ONE_PASSAGE),
    Subset("multifieldqa_en_mixup", "en", "f1_keywords", _ONE_PASSAGE),
    Subset("multifieldqa_zh_mixup", "zh", "f1_keywords", _ONE_PASSAGE_ZH),
    Subset("factrecall_en", "en", "f1", _FACTS, 16),
    Subset("factrecall_zh", "zh", "f1", _FACTS_ZH, 16),
    Subset("cmrc_mixup", "zh", "f1_keywords", _MIXED_ZH),
    Subset("lic_mixup", "zh", "f1_keywords", _LIC),
    Subset("dureader_mixup", "zh", "rouge_l", _MIXED_ZH),
)
SUBSETS = {subset.name: subset for subset in _ALL}


def subset_of(name: str) -> Subset:
    """The data set of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in SUBSETS:
        raise UsageError(f"LV-Eval has no data set {name!r}{closest(name, SUBSETS)}")
    return SUBSETS[name]
