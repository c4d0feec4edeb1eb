"""POST /v1/completions: texts that go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from moa.errors import UsageError
from moa.runner.request import FinishReason, SamplingParams, Update
from moa.runner.server.answer import Answer, answer
from moa.runner.server.body import read_body
from moa.runner.server.failures import ApiError, refusal
from moa.runner.server.fields import LARGEST_TOKEN, MOST_CHOICES, MOST_LOGPROBS, SamplingFields
from moa.runner.server.logprobs import CompletionLogprobs, joined
from moa.runner.server.service import Service, service_of
from moa.runner.server.work import Choice, Job

MAX_TOKENS = 16  # OpenAI's default
Prompt = str | tuple[int, ...]


def _prompts(given: object) -> tuple[Prompt, ...]:
    """A text, texts, tokens, or several of them. By hand: pydantic would try each kind on each of a million tokens."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given:
        if all(type(each) is int for each in given):
            return (_one(given),)
        if len(given) <= MOST_CHOICES:
            return tuple(_one(each) for each in given)
        raise PydanticCustomError("prompt", "at most {n} prompts are taken at a time", {"n": MOST_CHOICES})
    raise PydanticCustomError("prompt", "wanted a text, token ids, or a list of either, none of them empty")


def _one(given: object) -> Prompt:
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(type(t) is int and 0 <= t <= LARGEST_TOKEN for t in given):
        return tuple(given)
    raise PydanticCustomError("prompt", "wanted texts or lists of token ids")


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": LARGEST_TOKEN}, "minItems": 1}
_SOME = {"type": "array", "minItems": 1, "maxItems": MOST_CHOICES}
_ANY_OF = [{"type": "string"}, {**_SOME, "items": {"type": "string"}}, _IDS, {**_SOME, "items": _IDS}]
Prompts = Annotated[tuple[Prompt, ...], PlainValidator(_prompts), WithJsonSchema({"anyOf": _ANY_OF})]


class CompletionRequest(SamplingFields):
    """What is asked of /v1/completions. Beside OpenAI's: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos,
    add_special_tokens (of prompts given as text)."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: None = None
    suffix: None = None
    add_special_tokens: bool | None = None

    def plan_sampling(self, prompt_tokens: int, longest_tokens: int) -> SamplingParams:
        """How to go on from a prompt."""
        room = max(1, longest_tokens - prompt_tokens)
        max_tokens = min(MAX_TOKENS, room) if self.max_tokens is None else self.max_tokens
        return self.sampling(max_tokens, self.logprobs, self.logprobs if self.echo else None)


async def complete(request: Request) -> Response:
    """Answer a request for completions."""
    service = service_of(request)
    asked = await read_body(request, service, CompletionRequest)
    service.check_model(asked.model)
    if len(asked.prompt) * (asked.n or 1) > MOST_CHOICES:
        raise ApiError(400, f"at most {MOST_CHOICES} completions are made at a time", param="n", code="invalid_value")
    return await answer(request, service, asked, lambda: _jobs(service, asked), CompletionAnswer)


async def _jobs(service: Service, asked: CompletionRequest) -> list[Job]:
    """The prompts as tokens, and as texts where these are to come back."""
    jobs = []
    for prompt in asked.prompt:
        tokens, text = prompt, prompt
        if isinstance(prompt, str):
            tokens = await service.texts.encode(prompt, add_special_tokens=asked.add_special_tokens is not False)
        service.check_length(len(tokens))
        try:
            sampling = asked.plan_sampling(len(tokens), service.longest_tokens)
        except UsageError as error:
            raise refusal(error) from None
        if asked.echo and not isinstance(prompt, str):
            text = await service.texts.decode(prompt)
        jobs.append(Job(tuple(tokens), sampling, str(text) if asked.echo else ""))  # type: ignore[arg-type]  # ids by now
    return jobs


class CompletionAnswer(Answer):
    """Completions as OpenAI writes them."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, asked: SamplingFields, jobs: Sequence[Job]) -> None:
        super().__init__(service, asked, jobs)
        self.echoes = isinstance(asked, CompletionRequest) and bool(asked.echo)
        self.scores = isinstance(asked, CompletionRequest) and asked.logprobs is not None
        self._writers: dict[int, CompletionLogprobs] = {}

    def choice(self, number: int, choice: Choice) -> dict[str, Any]:
        """All of a completion."""
        update = Update(
            "",
            number,
            text=choice.text,
            logprobs=tuple(choice.logprobs),
            prompt_logprobs=tuple(choice.prompt_logprobs),
            finish=choice.finish,
        )
        return self.delta(number, update, is_first=True)

    def delta(self, number: int, update: Update, *, is_first: bool) -> dict[str, Any]:
        """What is new of it; the first part brings the prompt, if it is to be echoed."""
        text = self.job(number).text + update.text if is_first else update.text
        scores = self._scores(number, update, is_first=is_first) if self.scores else None
        return {"index": number, "text": text, "logprobs": scores, "finish_reason": _word(update.finish)}

    def _scores(self, number: int, update: Update, *, is_first: bool) -> dict[str, list[Any]]:
        if number not in self._writers:
            before = () if self.echoes else self.job(number).prompt
            self._writers[number] = CompletionLogprobs(self.service.texts, before)
        writer = self._writers[number]
        if not (is_first and self.echoes):
            return writer.of(update.logprobs)
        told = writer.of_prompt(self.job(number).prompt, update.prompt_logprobs)
        return joined(told, writer.of(update.logprobs))


def _word(finish: FinishReason | None) -> str | None:
    return None if finish is None else str(finish)
