"""What is asked of the engine and what it answers: frozen records. A request carries everything that decides its output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from moa.errors import ResourceError, UsageError

# What a request may ask for at most; each is memory or time that one client could take from all others.
MOST_COMPLETIONS, MOST_STOPS, MOST_LOGPROBS, MOST_BIASES = 128, 64, 100, 4096
LARGEST_SEED = (1 << 64) - 1
# Lower ones would make finite logits infinite, or choose the likeliest token in any case.
LEAST_TEMPERATURE, LEAST_REPETITION_PENALTY = 1e-5, 0.01


class QueueFullError(ResourceError):
    """The waiting queue is full; the same request may be taken later."""


class FinishReason(StrEnum):
    """Why a request ended; `STOP` and `LENGTH` are the words of OpenAI's API."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when to end.

    Args:
        max_tokens: tokens generated at most; 0 for none, which makes sense with `prompt_logprobs`.
        temperature: 0 (below 1e-5) is greedy: the likeliest token, whatever `top_k`, `top_p` and `min_p` say.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability.
        min_p: only tokens at least this share as likely as the likeliest.
        repetition_penalty: logits of tokens of prompt and output are divided (or, below 0, multiplied) by it.
        presence_penalty: taken from logits of tokens of the output.
        frequency_penalty: the same for each time that they occur.
        logit_bias: added to logits of these tokens.
        stop: strings that end the output, which is cut before them; need a tokenizer.
        stop_token_ids: tokens that end the output, beside the model's own; part of `tokens`, not of `text`.
        ignore_eos: go on behind the model's own end tokens (benchmarks).
        seed: of this request alone; None for a random one.
        logprobs: give the log-probability of each token, and of so many of the likeliest; None for none. They are the
            model's own, before temperature, penalties and bias.
        prompt_logprobs: the same for the tokens of the prompt but the first; the prefix cache is not used then.
        n: completions of the prompt, each with a seed of its own.

    Raises:
        UsageError: names the field, what was wanted and what was got.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, low, high in _WHOLE:
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), low, high)
        for name, least, most in _REAL:
            _check_real(name, getattr(self, name), least, most)
        if self.top_p <= 0:
            raise UsageError(f"top_p must be above 0, got {self.top_p!r}")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _check_whole("stop_token_ids", token, 0, _MOST_INT)
        if len(self.stop_token_ids) > MOST_STOPS:
            raise UsageError(f"stop_token_ids holds {len(self.stop_token_ids)} tokens, at most {MOST_STOPS} are taken")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs in order of token."""
        return self.logit_bias if isinstance(self.logit_bias, tuple) else _biases(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def cuts_tail(self) -> bool:
        """Whether only the likeliest tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_MOST_INT = (1 << 31) - 1
_WHOLE = (
    ("max_tokens", 0, _MOST_INT),
    ("top_k", 0, _MOST_INT),
    ("seed", 0, LARGEST_SEED),
    ("logprobs", 0, MOST_LOGPROBS),
    ("prompt_logprobs", 0, MOST_LOGPROBS),
    ("n", 1, MOST_COMPLETIONS),
)
_REAL = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", LEAST_REPETITION_PENALTY, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
)


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}, got {value!r}")


def _check_real(name: str, value: object, least: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:  # type: ignore[arg-type,operator]  # checked first
        raise UsageError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")


def _biases(given: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    pairs = tuple(sorted(given.items() if isinstance(given, Mapping) else given))
    if len(pairs) > MOST_BIASES:
        raise UsageError(f"logit_bias holds {len(pairs)} tokens, at most {MOST_BIASES} are taken")
    for token, bias in pairs:
        _check_whole("logit_bias", token, 0, _MOST_INT)
        _check_real("logit_bias", bias, -100.0, 100.0)
    return pairs


def _stops(given: str | Iterable[str]) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given)
    if len(stops) > MOST_STOPS or any(not isinstance(stop, str) or not stop for stop in stops):
        raise UsageError(f"stop must be at most {MOST_STOPS} strings, none of them empty, got {stops!r:.80}")
    return stops


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that was asked for: `n` of them make a group, told apart by `index`.

    Args:
        name: of the group, given by the client or made up.
        index: which of the group's completions.
        prompt: token ids, at least one.
        sampling: how to go on.
        seed: resolved; with it and a token's place in the text the draw is fixed.
        pinned_tokens: for pinned plans, the length that spans are pinned to: prompt and `max_tokens`.
    """

    name: str
    index: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    pinned_tokens: int | None = None

    @property
    def most_cached_tokens(self) -> int:
        """Tokens whose keys are in memory at the very end: the last one generated is never fed."""
        return len(self.prompt) + max(0, self.sampling.max_tokens - 1)


class TokenLogprobs(NamedTuple):
    """The log-probability of a token, its rank among all (1 is the likeliest), and the likeliest tokens with theirs."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished completion took. Times are of the engine's monotonic clock, None for what never came.

    `cached_tokens` of the prompt came from the prefix cache when it was first admitted; `preemptions` is how often it
    was taken out and computed anew.
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    arrived_s: float
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float


@dataclass(frozen=True, slots=True)
class Update:
    """What is new about a completion after a step.

    Args:
        name, index: of the request.
        tokens: token ids generated since the last update.
        text: what they read, without what may yet turn out to begin a stop string; "" without a tokenizer.
        logprobs: one per token where they were asked for.
        prompt_logprobs: those of the prompt, once, with the first token; entry i is of token i + 1.
        finish: why it ended; None while it goes on.
        error: what went wrong, with `FinishReason.ERROR`.
        usage: with the last update.
    """

    name: str
    index: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None
    usage: Usage | None = None

    def joined(self, later: Update) -> Update:
        """This update and the one that follows it, as one."""
        return Update(
            self.name,
            self.index,
            tokens=self.tokens + later.tokens,
            text=self.text + later.text,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
            finish=later.finish,
            error=later.error,
            usage=later.usage,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """All updates of one completion together."""

    name: str
    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason
    error: str | None
    usage: Usage

    @classmethod
    def of(cls, updates: Iterable[Update]) -> Completion:
        """Join the updates of one completion, the last of which says how it ended.

        Raises:
            ValueError: the last one does not.
        """
        last: Update | None = None
        for update in updates:
            last = update if last is None else last.joined(update)
        if last is None or last.finish is None or last.usage is None:
            raise ValueError("these updates do not end; wait for the one with a finish reason")
        return cls(
            last.name,
            last.index,
            last.tokens,
            last.text,
            last.logprobs,
            last.prompt_logprobs,
            last.finish,
            last.error,
            last.usage,
        )
