"""Chat templates: conversations as the one text that the model was trained to see."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from moa.errors import DataError, UsageError

ChatTemplate = Literal["auto", "on", "off"]
# Templates may write today's date; texts must be the same tomorrow, or a run could not be resumed.
FIXED_DATE = "{%- macro strftime_now(format) -%}2024-07-26{%- endmacro -%}"


@dataclass(frozen=True, slots=True)
class Chat:
    """How conversations are written for a tokenizer: by its chat template, or as paragraphs where `template` is ""."""

    tokenizer: PreTrainedTokenizerBase
    template: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, wanted: ChatTemplate) -> Chat:
        """With the tokenizer's template where it has one ("auto"), always ("on") or never ("off").

        Raises:
            UsageError: it is wanted and there is none.
        """
        has_one = bool(tokenizer.chat_template)
        if wanted == "on" and not has_one:
            raise UsageError("--chat-template on, but the tokenizer has none; use auto or off, or the chat model's own")
        return cls(tokenizer, str(tokenizer.get_chat_template()) if has_one and wanted != "off" else "")

    @property
    def sha256(self) -> str:
        """The template's digest, or "" where none is applied."""
        return hashlib.sha256(self.template.encode()).hexdigest() if self.template else ""

    def write(self, turns: Sequence[tuple[str, str]], *, ask: bool) -> tuple[str, list[range]]:
        """The conversation as one text, and the characters that each turn's content takes in it.

        Args:
            turns: (role, content) pairs.
            ask: end where the assistant's next turn begins.

        Raises:
            DataError: the template refuses the turns, or does not write their contents as they are.
        """
        contents = [content.strip() for _, content in turns]
        if not self.template:
            text = "\n\n".join(contents)
        else:
            messages = [{"role": role, "content": content} for (role, _), content in zip(turns, contents, strict=True)]
            text = self._rendered(messages, ask)
        return text, _places(text, contents)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the characters of each; a template brings its own special tokens, the tokenizer adds others."""
        encoded = self.tokenizer(text, add_special_tokens=not self.template, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def _rendered(self, messages: list[dict[str, str]], ask: bool) -> str:
        template = FIXED_DATE + self.template if "strftime_now" in self.template else self.template
        apply: Any = self.tokenizer.apply_chat_template  # typed for one of its many results
        try:
            rendered: str = apply(messages, chat_template=template, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            reason = " ".join(str(error).split())[:200]
            roles = ", ".join(message["role"] for message in messages[:4])
            raise DataError(
                f"the chat template refuses a conversation of {roles}: {reason}; use --chat-template off"
            ) from None
        return rendered


def _places(text: str, contents: Sequence[str]) -> list[range]:
    places, at = [], 0
    for content in contents:
        start = text.find(content, at)
        if start < 0:
            raise DataError(
                f"the chat template does not write a turn as it is ({content[:40]!r}...); use --chat-template off"
            )
        at = start + len(content)
        places.append(range(start, at))
    return places
