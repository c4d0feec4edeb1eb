"""POST /v1/chat/completions: conversations, written by the model's own template and no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from moa.errors import UsageError
from moa.runner.request import Update
from moa.runner.server.answer import Answer, answer
from moa.runner.server.body import read_body
from moa.runner.server.failures import ApiError, refusal
from moa.runner.server.fields import MOST_LOGPROBS, MOST_TOKENS, SamplingFields, Strict
from moa.runner.server.logprobs import chat_logprobs
from moa.runner.server.service import Service, service_of
from moa.runner.server.work import Choice, Job

MOST_MESSAGES, MOST_PARTS = 1024, 64


class TextPart(Strict):
    """A piece of a message; nothing else than text is taken, and nothing is fetched."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn. What OpenAI's client writes of an answer may come back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS)]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def plain(self) -> dict[str, str]:
        """As templates take it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": "".join(parts), **named}


class PlainText(Strict):
    """The only format of answers."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """What is asked of /v1/chat/completions. Beside OpenAI's: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: PlainText | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Of the answer; None for all there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scores(self) -> int | None:
        """Likeliest tokens to tell of each place; None to tell nothing."""
        return self.top_logprobs or 0 if self.logprobs else None


async def chat(request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    asked = await read_body(request, service, ChatRequest)
    service.check_model(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs are told with logprobs only", param="top_logprobs", code="invalid_value")
    return await answer(request, service, asked, lambda: _jobs(service, asked), ChatAnswer)


async def _jobs(service: Service, asked: ChatRequest) -> list[Job]:
    prompt = await service.texts.write_chat([message.plain for message in asked.messages])
    service.check_length(len(prompt))
    room = max(1, service.longest_tokens - len(prompt))
    try:
        sampling = asked.sampling(room if asked.most_tokens is None else asked.most_tokens, asked.scores)
    except UsageError as error:
        raise refusal(error) from None
    return [Job(prompt, sampling)]


class ChatAnswer(Answer):
    """Turns of the assistant as OpenAI writes them."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, number: int, choice: Choice) -> dict[str, Any]:
        """All of a turn."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        finish = None if choice.finish is None else str(choice.finish)
        scores = self._scores(choice.logprobs)
        return {"index": number, "message": message, "logprobs": scores, "finish_reason": finish}

    def delta(self, number: int, update: Update, *, is_first: bool) -> dict[str, Any]:
        """What is new of it."""
        told = {"role": "assistant", "content": update.text} if is_first else {"content": update.text}
        finish = None if update.finish is None else str(update.finish)
        return {"index": number, "delta": told, "logprobs": self._scores(update.logprobs), "finish_reason": finish}

    def _scores(self, scores: Sequence[Any]) -> dict[str, list[Any]] | None:
        wanted = isinstance(self.asked, ChatRequest) and self.asked.scores is not None
        return chat_logprobs(self.service.texts, scores) if wanted else None
