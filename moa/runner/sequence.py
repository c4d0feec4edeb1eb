"""A request on its way through the engine: its job for the scheduler, its tokens, and what was said of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from moa.runner.policies import Job
from moa.runner.request import FinishReason, Request, TokenLogprobs, Update, Usage
from moa.runner.sampling import Bias, Draw, Said
from moa.runner.text import TextStream


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence(Job):
    """A request's state.

    Args:
        request: what was asked.
        tokens: prompt and output.
        ends: tokens that end it.
        text: its text stream; None without a tokenizer.
        said: counts for penalties, while it has any.
        bias: of its logits, if it has one.
        prompt_logprobs: as far as they are known.
        cached_tokens: that came from the prefix cache when it was first admitted.
        first_token_s: when its first token came.
        shortages: how often a step that it took part in ran out of memory.
        has_ended_well: whether its memory is what its tokens make of it, and nobody changes it any more.
    """

    request: Request
    tokens: list[int]
    ends: frozenset[int] = frozenset()
    text: TextStream | None = None
    said: Said | None = None
    bias: Bias | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    first_token_s: float | None = None
    shortages: int = 0
    has_ended_well: bool = False

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def draw(self) -> Draw:
        """What is wanted of its row of logits."""
        return Draw(self.request.sampling, self.request.seed, len(self.tokens), self.said, self.bias)

    def take(self, token: int, logprobs: TokenLogprobs | None, now_s: float) -> Update:
        """Go on by a token; the update says whether it was the last."""
        first = not self.output_tokens
        if first:
            self.first_token_s = now_s
        self.tokens.append(token)
        self.known_tokens += 1
        if self.said is not None:
            self.said.take(token)
        text = self._show(token)
        finish = self._finish(token)
        if finish is not None and self.text is not None and not self.text.is_stopped:
            text += self.text.rest()
        return Update(
            self.request.name,
            self.request.index,
            tokens=(token,),
            text=text,
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=tuple(self.prompt_logprobs) if first else (),
            finish=finish,
            usage=None if finish is None else self.usage(now_s),
        )

    def end(self, finish: FinishReason, now_s: float, error: str | None = None) -> Update:
        """The last update of a request that ends without another token."""
        text = self.text.rest() if self.text is not None else ""
        told = tuple(self.prompt_logprobs) if not self.output_tokens else ()
        request = self.request
        return Update(
            request.name,
            request.index,
            text=text,
            prompt_logprobs=told,
            finish=finish,
            error=error,
            usage=self.usage(now_s),
        )

    def usage(self, now_s: float) -> Usage:
        """What it has taken up to now."""
        return Usage(
            prompt_tokens=len(self.request.prompt),
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            arrived_s=self.arrived_s,
            admitted_s=self.admitted_s,
            first_token_s=self.first_token_s,
            finished_s=now_s,
        )

    def _show(self, token: int) -> str:
        return "" if self.text is None or token in self.ends else self.text.add(token)

    def _finish(self, token: int) -> FinishReason | None:
        if token in self.ends or (self.text is not None and self.text.is_stopped):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.output_tokens >= self.request.sampling.max_tokens else None
