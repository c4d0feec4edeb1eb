"""Log-probabilities as OpenAI's two kinds of answers write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moa.runner.request import TokenLogprobs
from moa.runner.server.texts import Texts
from moa.runner.text import TextStream

# JSON has no infinity; what others send in its place.
LEAST = -9999.0


class CompletionLogprobs:
    """Those of one choice of /v1/completions, chunk by chunk: `text_offset` goes on where the last chunk ended.

    Args:
        texts: the tokenizer.
        before: tokens of the prompt, unless it is echoed.
    """

    def __init__(self, texts: Texts, before: Sequence[int] = ()) -> None:
        self._texts, self._stream, self._offset = texts, TextStream(texts.tokenizer, (), before), 0

    def of_prompt(self, prompt: Sequence[int], scores: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """Of a prompt that is echoed: nothing comes before its first token, which so has none."""
        told = self._of(prompt[:1], [None])
        return joined(told, self.of(scores))

    def of(self, scores: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """Of tokens generated."""
        return self._of([score.token for score in scores], scores)

    def _of(self, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._texts.piece(token) for token in tokens],
            "token_logprobs": [None if score is None else _finite(score.logprob) for score in scores],
            "top_logprobs": [None if score is None else self._top(score) for score in scores],
            "text_offset": [self._next_offset(token) for token in tokens],
        }

    def _top(self, score: TokenLogprobs) -> dict[str, float]:
        """By text, the likeliest first; of two tokens that read alike the likelier one is told."""
        top: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            top.setdefault(self._texts.piece(token), _finite(logprob))
        return top

    def _next_offset(self, token: int) -> int:
        offset = self._offset
        self._offset += len(self._stream.add(token))
        return offset


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Two chunks as one."""
    return {name: first[name] + second[name] for name in first}


def chat_logprobs(texts: Texts, scores: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
    """Of tokens generated, as /v1/chat/completions writes them."""
    content = []
    for score in scores:
        top = [_chat_token(texts, token, logprob) for token, logprob in score.top]
        content.append({**_chat_token(texts, score.token, score.logprob), "top_logprobs": top})
    return {"content": content}


def _chat_token(texts: Texts, token: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.piece(token), "logprob": _finite(logprob), "bytes": list(texts.piece_bytes(token))}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
