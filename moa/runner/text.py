"""From tokens to text as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 6  # that the next word is read with
# A character has at most four bytes: more tokens that show nothing are none, or no text at all.
MOST_PENDING = 8


class TextStream:
    """The text of one request.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stops: strings that end the text, which is cut before the first of them.
        prompt: what the text follows: tokenizers drop the space before a text's first word, and this is not the first.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        before = list(prompt[-CONTEXT_TOKENS:])
        if before and self._tokenizer.decode(before).endswith("\ufffd"):
            before = []  # ends within a character, which the stream would show again
        self._shown, self._pending = before, list[int]()  # the last tokens that were shown, and those since
        self._stream = self._new_stream()
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What can be shown once this token has come."""
        piece = self._read(token)
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        kept = self._beginning_of_stop(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        held, self._held = self._held, ""
        return held

    def _read(self, token: int) -> str:
        """The text that the token completes; what cannot become a character is shown as U+FFFD."""
        self._pending.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - all that tokenizers raises: bytes that were half a character turn out to be none
            return self._flush()
        if piece:
            self._shown, self._pending = [*self._shown, *self._pending][-CONTEXT_TOKENS:], []
        elif len(self._pending) >= MOST_PENDING:  # the stream reads all of them again with every token
            return self._flush()
        return piece

    def _flush(self) -> str:
        """What the pending tokens read as they are; a new stream goes on behind what was shown before."""
        before, both = (self._decode(ids) for ids in (self._shown, [*self._shown, *self._pending]))
        piece = both[len(before) :] if both.startswith(before) else self._decode(self._pending)
        self._pending = []
        self._stream = self._new_stream()
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._shown, skip_special_tokens=True)

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
