"""Recall accuracy on the demo's language: facts anywhere in a text, asked for at its end.

One forward call per text answers all its questions. An answer is right when each of its tokens is the model's first
choice given the true text before it. That is exactly when greedy decoding from the end of the question writes the
answer: the first token it would write differently is the first one that is not the first choice. (Earlier questions
of the text, with their true answers, are part of the prompt.) `generate_matches` checks this against `generate`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moa.demo import language
from moa.devices import input_device
from moa.errors import DataError
from moa.eval.records import DepthScore, FamilyScore, RecallAtLength, RecallTask, Score
from moa.eval.scoring import score
from moa.profile.data import TextSample
from moa.profile.synthetic import fit_words

WORDS_PER_QUESTION = 64


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question of a text: the token positions of its answer, and where its fact begins as a share of the text."""

    family: language.Family
    depth_ratio: float
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RecallText:
    """Token ids of one text, and its questions in order."""

    token_ids: tuple[int, ...]
    questions: tuple[AskedQuestion, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model did with one question; `choices` are its first choices at `question.positions`, `nll` their sum."""

    question: AskedQuestion
    choices: tuple[int, ...]
    right: bool
    nll: float


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths_tokens: Sequence[int],
    task: RecallTask | None = None,
) -> tuple[RecallAtLength, ...]:
    """Recall of `model` at each length; deterministic for a task and tokenizer.

    Args:
        model: a transformers causal LM, dense or with a plan applied.
        tokenizer: any fast tokenizer; the text is the same, its length in words is fitted.
        lengths_tokens: texts have that many tokens or slightly fewer.
        task: families, sizes and seed; by default 12 forward calls per length.

    Raises:
        DataError: a length is too short for its questions.
        ModelError: the model cannot be scored.
    """
    task = task or RecallTask()
    return tuple(_recall_at(model, recall_texts(tokenizer, n, task), n, task.depth_buckets) for n in lengths_tokens)


def _recall_at(
    model: PreTrainedModel, texts: Sequence[RecallText], length_tokens: int, depth_buckets: int
) -> RecallAtLength:
    answers = [a for text in texts for a in answer(model, text)]
    families = dict.fromkeys(a.question.family for a in answers)
    buckets: dict[int, list[Answer]] = {}
    for a in answers:
        buckets.setdefault(min(depth_buckets - 1, int(a.question.depth_ratio * depth_buckets)), []).append(a)
    return RecallAtLength(
        length_tokens=length_tokens,
        texts=len(texts),
        overall=_score(answers),
        families=tuple(
            FamilyScore(family=f, score=_score([a for a in answers if a.question.family == f])) for f in families
        ),
        depths=tuple(
            DepthScore(from_ratio=i / depth_buckets, to_ratio=(i + 1) / depth_buckets, score=_score(buckets[i]))
            for i in sorted(buckets)
        ),
    )


def _score(answers: Sequence[Answer]) -> Score:
    return Score.of(
        right=sum(a.right for a in answers),
        questions=len(answers),
        nll_sum=sum(a.nll for a in answers),
        answer_tokens=sum(len(a.choices) for a in answers),
    )


def answer(model: PreTrainedModel, text: RecallText) -> tuple[Answer, ...]:
    """The model's answers to all questions of one text, by one forward call; see `score` for what it raises."""
    positions = [p for question in text.questions for p in question.positions]
    choices, losses = (x.tolist() for x in score(model, text.token_ids, positions))
    wanted = [text.token_ids[p] for p in positions]
    answers, at = [], 0
    for question in text.questions:
        part = slice(at, at + len(question.positions))
        at = part.stop
        answers.append(Answer(question, tuple(choices[part]), choices[part] == wanted[part], sum(losses[part])))
    return tuple(answers)


def recall_texts(tokenizer: PreTrainedTokenizerBase, n_tokens: int, task: RecallTask) -> tuple[RecallText, ...]:
    """The texts of a task at one length, family after family; leaving out a family leaves the others' texts unchanged.

    Raises:
        DataError: `n_tokens` is too short for a text with questions.
    """
    return tuple(
        _recall_text(*fitted_text(tokenizer, n_tokens, family, task.questions_per_text, task.seed, i))
        for family in dict.fromkeys(task.families)
        for i in range(task.single_texts if family == "single" else task.texts_per_family)
    )


def fitted_text(
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    family: language.Family,
    most_questions: int,
    seed: int,
    number: int,
) -> tuple[language.Sample, TextSample]:
    """One text of at most `n_tokens`, its words as many as fit: as words, and as tokens.

    Args:
        number: of the text among those of its seed, length and family.

    Raises:
        DataError: `n_tokens` is too short for a text with questions.
    """

    def draw(n_words: int) -> language.Sample:
        n_questions = 1 if family == "single" else max(1, min(most_questions, n_words // WORDS_PER_QUESTION))
        # "evaluation": a stream of its own, which no seed of the training or calibration texts can meet
        rng = random.Random(f"{seed}-{n_tokens}-{family}-{number}-evaluation")
        return language.recall_sample(rng, n_words, family, n_questions)

    fitted = fit_words(tokenizer, n_tokens, draw)
    if fitted is None:
        raise DataError(f"{n_tokens} tokens are too short for a text with {family} questions; use longer --lengths")
    return fitted


def _recall_text(sample: language.Sample, rendered: TextSample) -> RecallText:
    return RecallText(rendered.token_ids, _asked(sample, rendered))


def _asked(sample: language.Sample, rendered: TextSample) -> tuple[AskedQuestion, ...]:
    """The questions with their answers' tokens: runs of neighbouring positions, since words stand between answers."""
    positions = rendered.answer_positions
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(positions)) if b != a + 1), len(positions)]
    runs = [positions[a:b] for a, b in pairwise(starts)]
    if not positions or len(runs) != len(sample.questions):
        raise DataError(
            f"the tokenizer does not keep answers apart: {len(sample.questions)} answers became {len(runs)} runs of "
            "tokens; use a tokenizer that splits at spaces"
        )
    return tuple(AskedQuestion(q.family, q.depth_ratio, run) for q, run in zip(sample.questions, runs, strict=True))


@dataclass(frozen=True, slots=True)
class GenerateCheck:
    """How many of some prompts `generate` continues just as the packed check says."""

    prompts: int
    agreeing: int


def generate_matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length_tokens: int,
    prompts: int = 4,
    task: RecallTask | None = None,
) -> GenerateCheck:
    """Whether greedy `model.generate` writes the packed check's choices, up to and including the first wrong one.

    One question each of `prompts` texts, the families in turn. With a pinned plan the two may differ: generate pins
    spans to the length of its own prompt and answer, the packed check to the whole text.

    Raises:
        DataError: `length_tokens` is too short, or the task has fewer texts than `prompts`.
    """
    texts = _families_in_turn(recall_texts(tokenizer, length_tokens, task or RecallTask()))
    if len(texts) < prompts:
        raise DataError(f"{prompts} prompts need as many texts, the task has {len(texts)}")
    agreeing = 0
    for i, text in enumerate(texts[:prompts]):
        packed = answer(model, text)[i % len(text.questions)]
        agreeing += _written(model, tokenizer, text, packed) == _up_to_first_wrong(text, packed)
    return GenerateCheck(prompts, agreeing)


def _families_in_turn(texts: Sequence[RecallText]) -> list[RecallText]:
    seen: dict[str, int] = {}
    turns = []
    for i, text in enumerate(texts):
        family = text.questions[0].family
        seen[family] = seen.get(family, 0) + 1
        turns.append((seen[family], i))
    return [texts[i] for _, i in sorted(turns)]


def _up_to_first_wrong(text: RecallText, packed: Answer) -> list[int]:
    wanted = [text.token_ids[p] for p in packed.question.positions]
    wrong = (i for i, (a, b) in enumerate(zip(packed.choices, wanted, strict=True)) if a != b)
    return list(packed.choices[: next(wrong, len(wanted)) + 1])


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: RecallText, packed: Answer) -> list[int]:
    """What generate writes after the question, as many tokens as the packed check vouches for."""
    prompt = torch.tensor([text.token_ids[: packed.question.positions[0]]], device=input_device(model))  # [1, N']
    count = len(_up_to_first_wrong(text, packed))
    greedy = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    with torch.no_grad():
        output = _generate(model)(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    written: list[int] = output[0, prompt.shape[1] :].tolist()
    return written


def _generate(model: Any) -> Callable[..., torch.Tensor]:
    """`model.generate`, whose type torch's module attributes hide."""
    generate: Callable[..., torch.Tensor] = model.generate
    return generate
