"""LV-Eval's scores, as its own `metrics.py` computes them (github.com/infinigence/LVEval), between 0 and 1.

Its paper says that ignored words are left out of the F1 score, too; its code, which made the published numbers, leaves them
out of the recall of keywords and of ROUGE-L alone. Where the two differ, the code is followed.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from moa.eval.longtext.kept import cache_folder
from moa.eval.lveval.subsets import Language, Subset

# Of an answer's keywords at least so many must be there, or it scores 0
LEAST_RECALL = {"en": 0.2, "zh": 0.4}
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION_ZH = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
PUNCTUATION = {"en": frozenset(string.punctuation), "zh": frozenset(string.punctuation + PUNCTUATION_ZH)}
IGNORED = {
    "en": frozenset(
        "and to of in her was with for it from is that his he by she they or at because be on are their what as had were "
        "about being this who but have has when which does".split()
    ),
    "zh": frozenset(
        "的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指 法 会 元 主要 以及 通过 首先 "
        "对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 用于 但 使用 让 具有 并 亿元 万元 上 类 基于 才 来 "
        "地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 带 度".split()
    ),
}


def score(subset: Subset, written: str, wanted: str, keywords: str | None = None) -> float:
    """What a written answer is worth.

    Args:
        subset: whose question it answers.
        wanted: the first of the right answers; LV-Eval looks at no other.
        keywords: what of it must be there, where the data set names any.

    Raises:
        ImportError: a package for Chinese texts is missing.
    """
    if subset.metric == "rouge_l":
        return rouge_l(written, wanted)
    ours, theirs = words(subset.language, written), words(subset.language, wanted)
    if subset.metric == "f1_keywords" and subset.language == "zh":
        keywords = keywords or wanted  # of English texts without keywords, nothing must be there
    if subset.metric == "f1_keywords" and keywords and not _holds(subset.language, ours, keywords):
        return 0.0
    return f1(ours, theirs)


def words(language: Language, text: str) -> list[str]:
    """A text's words, small, without punctuation; of English without articles, of Chinese as jieba cuts them."""
    if language == "zh":
        cut = ("".join(_bare("zh", word).split()) for word in _jieba().cut(text))
        return [word for word in cut if word]
    return ARTICLES.sub(" ", _bare("en", text)).split()


def f1(written: Sequence[str], wanted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, each counted as often as it occurs."""
    shared = (Counter(written) & Counter(wanted)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(written), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(written: str, wanted: str) -> float:
    """ROUGE-L of Chinese words, ignored ones left out; 0 where a text has no others."""
    from rouge import Rouge

    # cut twice, as LV-Eval does: what jieba joins may depend on the blanks between
    texts = [" ".join(_telling(_jieba().cut(" ".join(_jieba().cut(text))))) for text in (written, wanted)]
    try:
        (found,) = Rouge(metrics=["rouge-l"]).get_scores(*texts)
    except (ValueError, RecursionError):  # an empty text, or one too long for the package; LV-Eval gives 0 too
        return 0.0
    return float(found["rouge-l"]["f"])


def _telling(cut: Iterable[str]) -> list[str]:
    small = ("".join(_bare("zh", word).split()) for word in cut)
    return [word for word in small if word not in IGNORED["zh"]]


def _holds(language: Language, written: Sequence[str], keywords: str) -> bool:
    """Whether enough of the keywords are there; words that say little count among the wanted, never as found."""
    wanted = words(language, keywords)
    shared = Counter(written) & Counter(wanted)
    found = sum(count for word, count in shared.items() if word not in IGNORED[language])
    return not wanted or found / len(wanted) >= LEAST_RECALL[language]


def _bare(language: Language, text: str) -> str:
    return "".join(sign for sign in text.lower() if sign not in PUNCTUATION[language])


@cache
def _jieba() -> Any:
    """jieba with its usual dictionary, kept in the user's own cache: it would load what anybody wrote to a shared folder."""
    import jieba

    folder = cache_folder().with_name("jieba")
    folder.mkdir(parents=True, exist_ok=True)
    jieba.setLogLevel("WARNING")
    cutter = jieba.Tokenizer()
    cutter.tmp_dir = str(folder)
    return cutter
