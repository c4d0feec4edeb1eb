"""How many tokens an answer took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moa.runner.request import Usage


def usage_of(prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """As OpenAI writes it."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def cached(ended: Iterable[Usage | None]) -> int:
    """Tokens of prompts that were not computed, from one completion of each prompt: usage tells a prompt once."""
    return sum(usage.cached_tokens for usage in ended if usage is not None)
