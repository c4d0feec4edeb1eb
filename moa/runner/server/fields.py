"""Fields that requests for completions and for chats share, and the limits of each."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from moa.errors import closest
from moa.runner.request import SamplingParams

# What one request may hold: each is memory or time that one client could take from all others.
MOST_CHOICES, MOST_STOPS, STOP_CHARS, MOST_LOGPROBS, MOST_BIASES = 128, 16, 256, 20, 1024
MOST_TOKENS, LARGEST_TOKEN = 1 << 24, (1 << 31) - 1


class Strict(BaseModel):
    """Takes no unknown field, no number as text, no NaN.

    It stops at the first unknown field: pydantic would make an error of each of a million.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _know_fields(cls, given: object) -> object:
        if isinstance(given, dict):
            for name in given:
                if name not in cls.model_fields:
                    hint = closest(str(name)[:64], cls.model_fields)
                    raise PydanticCustomError(
                        "unknown_field", "there is no field {name}{hint}", {"name": repr(str(name)[:64]), "hint": hint}
                    )
        return given


def _stops(given: Any) -> tuple[str, ...]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    known = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not known or any(not isinstance(stop, str) or not 0 < len(stop) <= STOP_CHARS for stop in stops):
        raise PydanticCustomError(
            "stop", "wanted up to {n} strings of 1 to {chars} characters", {"n": MOST_STOPS, "chars": STOP_CHARS}
        )
    return tuple(stops)


def _tokens(given: Any) -> tuple[int, ...]:
    tokens = [] if given is None else given
    known = isinstance(tokens, list) and len(tokens) <= MOST_STOPS
    if not known or any(type(token) is not int or not 0 <= token <= LARGEST_TOKEN for token in tokens):
        raise PydanticCustomError("stop_token_ids", "wanted up to {n} token ids", {"n": MOST_STOPS})
    return tuple(tokens)


def _biases(given: Any) -> dict[int, float]:
    pairs = {} if given is None else given
    if not isinstance(pairs, dict) or len(pairs) > MOST_BIASES:
        raise PydanticCustomError("logit_bias", "wanted an object of up to {n} token ids", {"n": MOST_BIASES})
    for token, bias in pairs.items():
        if not (token.isascii() and token.isdigit() and len(token) < 11 and int(token) <= LARGEST_TOKEN):
            raise PydanticCustomError("logit_bias", "wanted token ids as keys, got {key}", {"key": repr(token[:32])})
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", "wanted a number from -100 to 100 for token {key}", {"key": token})
    return {int(token): float(bias) for token, bias in pairs.items()}


_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": STOP_CHARS}
Stops = Annotated[
    tuple[str, ...],
    PlainValidator(_stops),
    WithJsonSchema(
        {"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MOST_STOPS}, {"type": "null"}]}
    ),
]
_TOKEN_SCHEMA = {"type": "integer", "minimum": 0, "maximum": LARGEST_TOKEN}
StopTokens = Annotated[
    tuple[int, ...],
    PlainValidator(_tokens),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _TOKEN_SCHEMA, "maxItems": MOST_STOPS}, {"type": "null"}]}),
]
_BIAS_SCHEMA = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "maxProperties": MOST_BIASES,
}
Biases = Annotated[
    dict[int, float], PlainValidator(_biases), WithJsonSchema({"anyOf": [_BIAS_SCHEMA, {"type": "null"}]})
]


class StreamOptions(Strict):
    """What a stream tells beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against onlookers of encrypted traffic; there is none


class SamplingFields(Strict):
    """How tokens are chosen; null stands for the default. Those of OpenAI that change nothing here are taken and ignored."""

    model: Annotated[str, Field(max_length=512)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST_TOKEN)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases = Field(default_factory=dict)
    stop: Stops = ()
    stop_token_ids: StopTokens = ()
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 64) - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def sampling(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """As the engine takes it.

        Raises:
            UsageError: the engine's own checks.
        """
        names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "ignore_eos")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),  # -1 is what others call all of them
            logit_bias=self.logit_bias,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            seed=None if self.seed is None else self.seed % (1 << 64),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options are for streams; leave them out or say stream")
        return self
