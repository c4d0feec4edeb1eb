"""LV-Eval's scores of answers, worked out by hand from its definition."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moa.eval.lveval import metrics
from moa.eval.lveval.metrics import LEAST_RECALL, f1, score, words
from moa.eval.lveval.subsets import SUBSETS

ENGLISH, PLAIN, CHINESE = SUBSETS["multifieldqa_en_mixup"], SUBSETS["factrecall_en"], SUBSETS["cmrc_mixup"]
DUREADER = SUBSETS["dureader_mixup"]


@pytest.mark.parametrize(
    ("written", "wanted", "worth"),
    [
        ("Paris", "Paris", 1.0),
        ("The PARIS!", "paris", 1.0),  # small, without punctuation and articles
        ("in Paris", "Paris", 2 / 3),  # precision 1/2, recall 1
        ("Paris Paris", "Paris", 2 / 3),  # a word counts as often as it is wanted
        ("a thesis", "thesis", 1.0),
        ("Rome", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("Paris", "", 0.0),
        ("king's 1,984", "kings 1984", 1.0),
    ],
)
def test_f1_of_words(written: str, wanted: str, worth: float) -> None:
    assert score(PLAIN, written, wanted) == pytest.approx(worth)


def test_keywords_decide_whether_anything_counts() -> None:
    wanted, keywords = "the red cart of Anna stands here now", "red cart"
    assert score(ENGLISH, "stands here now", wanted, keywords) == 0
    assert score(ENGLISH, "stands here now", wanted) > 0
    assert score(ENGLISH, "stands here now", wanted, "") > 0
    assert score(ENGLISH, "a cart", wanted, keywords) == pytest.approx(2 * 1 * (1 / 7) / (1 + 1 / 7))
    assert score(PLAIN, "stands here now", wanted, keywords) > 0, "this data set does not ask for them"
    assert score(ENGLISH, "stands here now", wanted, "!") > 0, "no word is wanted"


def test_words_that_say_little_are_wanted_and_never_found() -> None:
    keywords = "who of was with it"
    assert score(ENGLISH, keywords, keywords, keywords) == 0
    assert score(ENGLISH, "one who of was it", "one who of was it", "one who of was it") == 1, "1/5 is enough"
    assert score(ENGLISH, "one who of was it is", "one who of was it is", "one who of was it is") == 0, "1/6 is not"
    assert LEAST_RECALL["en"] == 1 / 5


def test_chinese_words_are_jiebas() -> None:
    assert words("zh", "我来到北京 清华大学！AB") == ["我", "来到", "北京", "清华大学", "ab"]
    assert score(CHINESE, "清华大学。", "清华大学") == 1
    assert score(CHINESE, "我来到北京", "我来到清华大学") == pytest.approx(2 / 3)


def test_chinese_answers_are_their_own_keywords() -> None:
    assert score(CHINESE, "北京", "我来到北京清华大学") == 0, "1/4 of the answer's words"
    assert score(CHINESE, "北京", "我来到北京清华大学", "北京") == pytest.approx(2 / 5)
    assert score(SUBSETS["factrecall_zh"], "北京", "我来到北京清华大学") == pytest.approx(2 / 5)


def test_rouge_l_leaves_out_words_that_say_little() -> None:
    assert score(DUREADER, "我的清华大学", "我和清华大学") == pytest.approx(1, abs=1e-6)
    # of 我 来到 北京 and 我 来到 清华大学 the longest common sequence has two words of three
    assert score(DUREADER, "我来到北京", "我来到清华大学") == pytest.approx(2 / 3, abs=1e-6)
    assert score(DUREADER, "", "北京") == score(DUREADER, "的", "北京") == score(DUREADER, "上海", "北京") == 0


def test_jiebas_dictionary_is_kept_where_only_its_user_writes(cache: Path) -> None:
    metrics._jieba.cache_clear()
    assert words("zh", "北京") == ["北京"]
    (kept,) = (cache / "moa" / "jieba").iterdir()
    assert kept.stat().st_uid == os.getuid()
    metrics._jieba.cache_clear()


def test_f1_counts() -> None:
    assert f1("a b c".split(), "a a b".split()) == pytest.approx(2 / 3)
