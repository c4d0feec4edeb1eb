"""What the YAML files in `moa/eval/tasks` name: the data of a task, and how an answer is scored."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moa import demo
from moa.errors import ModelError, UsageError
from moa.eval.longtext.families import family as family_of
from moa.eval.longtext.kept import documents
from moa.hf.load import first_line

DEFAULT_LENGTHS = (4096,)
DEFAULT_SAMPLES = 100
DEFAULT_SEED = 42
OPTIONS = ("passages_file", "text_file")


def make_dataset(*, family: str, **given: Any) -> dict[str, Dataset]:
    """The documents of a family at every length.

    Args:
        family: its name.
        given: lm-eval's `--metadata` and `--model_args`: `max_seq_lengths`, `num_samples` per length, `data_seed`,
            `passages_file`, `text_file`, and `tokenizer` or `pretrained`.

    Raises:
        UsageError: there is no tokenizer, or a value cannot be meant.
        DataError: a length is too short, or the tokenizer cannot write the texts.
    """
    name = given.get("tokenizer") or given.get("pretrained")
    if not isinstance(name, str):
        raise UsageError("made-up tasks are sized by the model's tokenizer; give --metadata tokenizer=NAME")
    tokenizer = _tokenizer(demo.resolve(name), given.get("revision"), bool(given.get("trust_remote_code")))
    lengths = given.get("max_seq_lengths") or DEFAULT_LENGTHS
    count = _whole("num_samples", given.get("num_samples", DEFAULT_SAMPLES))
    seed = _whole("data_seed", given.get("data_seed", DEFAULT_SEED), least=0)
    options = {name: str(given[name]) for name in OPTIONS if given.get(name)}
    rows = [
        row
        for length in ([lengths] if isinstance(lengths, int | str) else lengths)
        for row in documents(family_of(family), tokenizer, _whole("max_seq_lengths", length), count, seed, options)
    ]
    return {"test": Dataset.from_list(rows)}


def all_found(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """RULER's score: the share of wanted texts that the answer holds."""
    answer = _cleaned(results[0])
    return _at_length(doc, sum(wanted.lower() in answer for wanted in doc["outputs"]) / len(doc["outputs"]))


def any_found(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """RULER's score where several answers are right: 1 if one of them is there."""
    answer = _cleaned(results[0])
    return _at_length(doc, float(any(wanted.lower() in answer for wanted in doc["outputs"])))


def first_choice(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """1 if greedy decoding writes the answer."""
    return _at_length(doc, float(results[0][1]))


def loss(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Negative log-likelihood per token of the scored part, in nats."""
    nll = -results[0][0] / doc["tokens"]
    return {"nll": nll, "perplexity": nll, str(doc["max_length"]): nll}


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean loss per token."""
    return math.exp(min(sum(losses) / len(losses), 700.0))  # above, a float overflows


def _at_length(doc: Mapping[str, Any], score: float) -> dict[str, float]:
    return {"score": score, str(doc["max_length"]): score}


def _cleaned(answer: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()


def _whole(name: str, value: Any, least: int = 1) -> int:
    number = int(value) if str(value).isdecimal() else -1
    if number < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


@cache
def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception for a damaged file
        raise ModelError(f"{name}: its tokenizer cannot be loaded: {first_line(error)}") from None
    return loaded
