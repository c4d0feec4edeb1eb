"""Text to tokens and back, on threads of its own: the event loop waits for none of it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from functools import cache
from typing import Any, ParamSpec, TypeVar

from transformers import PreTrainedTokenizerBase

from moa.errors import ModelError
from moa.runner.server.failures import ApiError
from moa.runner.server.longest_text import most_token_chars

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 2
# A chat template comes with the model; one that takes longer for a greeting, or says more, is broken or means harm.
TEMPLATE_S, TEMPLATE_CHARS = 10.0, 1 << 20
UNREADABLE = "\ufffd"  # what decoders show for bytes that are no character
BYTE = re.compile("<0x[0-9A-F]{2}>")  # how vocabularies with byte fallback name bytes


class Texts:
    """A tokenizer for many requests at a time.

    Args:
        tokenizer: the model's fast tokenizer.

    `longest_tokens` is what a request can have at most, where it is known: longer texts are refused before they are
    written in tokens, which would take long for nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        # Of its own: the backend's settings are shared state, and a tokenizer file may say to cut or pad texts.
        self._backend: Any = deepcopy(self.tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._token_chars = most_token_chars(self._backend)
        self.longest_tokens: int | None = None
        self._pool = ThreadPoolExecutor(THREADS, "moa-texts")
        self._pieces: dict[int, str] = {}
        anchors = self._encoded("a", add_special_tokens=False)
        self._anchor = anchors[-1:]
        self._anchor_text = self._read(self._anchor)

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be written."""
        return bool(self.tokenizer.chat_template)

    async def aside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have something done on a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Let the threads go; those in the midst of something are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text."""
        return await self.aside(self._encoded, text, add_special_tokens=add_special_tokens)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return await self.aside(lambda: str(self._backend.decode(list(tokens), skip_special_tokens=True)))

    async def write_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's turn, as the model's own template writes it.

        Raises:
            ApiError: there is no template, or it refuses the conversation.
        """
        if not self.has_chat_template:
            raise ApiError(400, "the model has no chat template; use /v1/completions", code="no_chat_template")
        return await self.aside(self._written, list(messages))

    def check_chat_template(self) -> None:
        """Try the template; it is a program that came with the model.

        Raises:
            ModelError: it does not end, or says too much.
        """
        if not self.has_chat_template:
            return
        told: list[int] = []
        trial = threading.Thread(target=self._try_template, args=(told,), name="moa-template", daemon=True)
        trial.start()  # not of the pool: the process must be able to end while it runs
        trial.join(TEMPLATE_S)
        if trial.is_alive():
            raise ModelError(f"the chat template takes longer than {TEMPLATE_S:g} s for a greeting")
        if told and told[0] > TEMPLATE_CHARS:
            raise ModelError(f"the chat template makes {told[0]} characters of a greeting")

    def _try_template(self, told: list[int]) -> None:
        with suppress(ApiError):  # it wants another kind of conversation, which clients may have
            told.append(len(self._rendered([{"role": "user", "content": "hello"}])))

    def piece(self, token: int) -> str:
        """What a token reads within a text, such as " word"; the same for the same token wherever it stands."""
        if token not in self._pieces:
            text = self._read([*self._anchor, token])
            self._pieces[token] = text.removeprefix(self._anchor_text)
        return self._pieces[token]

    def piece_bytes(self, token: int) -> bytes:
        """The same as bytes: of a token that is part of a character its own, which no text can tell."""
        piece = self.piece(token)
        name = self._backend.id_to_token(token)
        if UNREADABLE not in piece or name is None:
            return piece.encode()
        if BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        letters = letter_bytes()
        return bytes(letters[c] for c in name) if all(c in letters for c in name) else piece.encode()

    def _encoded(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        self._check_length(text)
        # a batch of one: encode() would hold Python's lock all the while, which stops the event loop too
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _check_length(self, text: str) -> None:
        if self.longest_tokens is None or self._token_chars is None:
            return
        if len(text) > self.longest_tokens * self._token_chars:
            told = (
                f"a prompt of {len(text)} characters; prompt and output together can have {self.longest_tokens} tokens"
            )
            raise ApiError(400, told, param="prompt", code="context_length_exceeded")

    def _written(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return self._encoded(self._rendered(messages), add_special_tokens=False)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            reason = " ".join(str(error).split())[:200]
            told = f"the model's chat template refuses this conversation: {reason}"
            raise ApiError(400, told, param="messages", code="invalid_value") from None
        return str(text)

    def _read(self, tokens: Sequence[int]) -> str:
        return str(self._backend.decode(list(tokens), skip_special_tokens=False))


@cache
def letter_bytes() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    As GPT-2 has it (`bytes_to_unicode` of its encoder.py): printable Latin-1 is itself, the rest follows from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}
