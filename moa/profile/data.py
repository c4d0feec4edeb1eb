"""Calibration texts: token ids with the positions of the answers whose loss counts."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moa.demo import language
from moa.errors import DataError, closest

SYNTHETIC = "synthetic"
ROW_KEYS = ("prompt", "answer")
GENERATED_ANSWER_TOKENS = 32
FIT_ATTEMPTS = 12


@dataclass(frozen=True, slots=True)
class TextSample:
    """One text of N tokens; `answer_ids[i]` is the token wanted at `answer_positions[i]`, each position >= 1."""

    token_ids: tuple[int, ...]
    answer_positions: tuple[int, ...]
    answer_ids: tuple[int, ...]
    truncated_tokens: int = 0


def digest(samples: Sequence[TextSample]) -> str:
    """SHA-256 of the samples' tokens and answers."""
    text = json.dumps([[s.token_ids, s.answer_positions, s.answer_ids] for s in samples])
    return hashlib.sha256(text.encode()).hexdigest()


def synthetic_samples(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, count: int, seed: int
) -> tuple[TextSample, ...]:
    """Recall texts in the demo's language for any fast tokenizer, of `n_tokens` or just below, one-hop families in turn.

    Raises:
        DataError: `n_tokens` is too short for a text with questions.
    """
    rng = random.Random(f"{seed}-{n_tokens}-calibration")
    return tuple(
        _synthetic(tokenizer, n_tokens, language.ONE_HOP[i % len(language.ONE_HOP)], rng) for i in range(count)
    )


def _synthetic(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, family: language.Family, rng: random.Random
) -> TextSample:
    state = rng.getstate()

    def draw(n_words: int) -> language.Sample:
        rng.setstate(state)
        return language.recall_sample(rng, n_words, family, 1 if family == "single" else max(1, min(16, n_words // 64)))

    fitted = fit_words(tokenizer, n_tokens, draw)
    if fitted is None:
        raise DataError(f"{n_tokens} tokens are too short for a recall text with this tokenizer; use longer --lengths")
    return fitted[1]


def fit_words(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, draw: Callable[[int], language.Sample]
) -> tuple[language.Sample, TextSample] | None:
    """The text that `draw` makes of as many words as fit in `n_tokens`, also rendered; None where none fits.

    Args:
        draw: makes a text of a number of words, the same one each time, or raises ValueError where they are too few.
    """
    n_words = n_tokens
    for _ in range(FIT_ATTEMPTS):
        try:
            sample = draw(n_words)
        except ValueError:
            break
        rendered = render(tokenizer, sample)
        if len(rendered.token_ids) <= n_tokens:
            return sample, rendered
        n_words = min(n_words - 1, int(n_words * n_tokens / len(rendered.token_ids)))
    return None


def render(tokenizer: PreTrainedTokenizerBase, sample: language.Sample) -> TextSample:
    """Tokenise a text of the demo's language; the words' places are found by character offsets."""
    words = [word for word in sample.words if word != "<bos>"]
    shift = len(sample.words) - len(words)
    starts, at = [], 0
    for word in words:
        starts.append(at)
        at += len(word) + 1
    encoded = tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False)
    answers = [range(q.start - shift, q.stop - shift) for q in sample.questions]
    spans = [(starts[r.start], starts[r.stop - 1] + len(words[r.stop - 1])) for r in answers]
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    positions = [
        i
        for i, (begin, end) in enumerate(offsets)
        if end > begin and any(begin < stop and end > start for start, stop in spans)
    ]
    return TextSample(tuple(ids), tuple(positions), tuple(ids[i] for i in positions))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows `{"prompt": text, "answer": text}` of a JSON-lines file; "answer" may be missing.

    Raises:
        DataError: the file is missing or empty, or a line is not such a row; names file, line and key.
    """
    try:
        # split at line feeds alone: JSON strings may hold the other line ends that `splitlines` knows
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; --dataset takes a JSON-lines file or {SYNTHETIC!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f'{path}: no samples; wanted lines like {{"prompt": "...", "answer": "..."}}')
    return rows


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: wanted a JSON object, got {type(row).__name__}")
    for key, value in row.items():
        if key not in ROW_KEYS:
            raise DataError(f"{where}: unknown key {key!r}{closest(key, ROW_KEYS)}; known are {', '.join(ROW_KEYS)}")
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: {key!r} must be a text that is not empty, got {value!r:.60}")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which is no text")
    if "prompt" not in row:
        raise DataError(f"{where}: the key 'prompt' is missing")
    return row


def split_rows(rows: Sequence[dict[str, str]], source: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows for calibration and, a quarter of them, for validation: disjoint, and the same for every length and seed.

    Raises:
        DataError: there are not two different rows.
    """
    digests = {hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest(): row for row in rows}
    if len(digests) < 2:
        raise DataError(f"{source}: one sample cannot both calibrate and validate; give at least two different ones")
    ordered = [digests[key] for key in sorted(digests)]
    held_out = max(1, len(ordered) // 4)
    return ordered[held_out:], ordered[:held_out]


def file_samples(
    rows: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    count: int,
    seed: int,
    source: str,
) -> tuple[TextSample, ...]:
    """Up to `count` rows for one length, seeded: longer than half of it, prompts cut on the left where they do not fit.

    What a prompt begins with by the tokenizer's own rules (such as `<bos>`) stays.

    Raises:
        DataError: no row is long enough.
    """
    order = random.Random(f"{seed}-{n_tokens}").sample(range(len(rows)), len(rows))
    samples = [s for i in order if _fits(s := _tokenize(rows[i], tokenizer, n_tokens), n_tokens)]
    if not samples:
        raise DataError(
            f"{source}: no sample is longer than {n_tokens // 2} tokens with an answer that leaves room for its prompt, "
            f"so none can calibrate length {n_tokens}; use shorter --lengths or longer texts"
        )
    return tuple(samples[:count])


def _fits(sample: TextSample, n_tokens: int) -> bool:
    length = len(sample.token_ids) + (0 if sample.answer_positions else GENERATED_ANSWER_TOKENS)
    return n_tokens // 2 < length <= n_tokens and len(sample.token_ids) > len(sample.answer_positions)


def _tokenize(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> TextSample:
    prompt = list(tokenizer(row["prompt"], verbose=False)["input_ids"])
    answer = list(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) if "answer" in row else []
    room = n_tokens - (len(answer) or GENERATED_ANSWER_TOKENS)
    cut = max(0, len(prompt) - max(1, room))
    kept = 1 if cut and prompt[0] == tokenizer.bos_token_id else 0
    prompt = prompt[:kept] + prompt[cut + kept :]
    positions = range(len(prompt), len(prompt) + len(answer))
    return TextSample((*prompt, *answer), tuple(positions), tuple(answer), cut)


@torch.no_grad()
def supervise(model: PreTrainedModel, samples: Sequence[TextSample]) -> Iterator[TextSample]:
    """The samples with the dense model's own answers: its first choices where an answer is given, else what it writes."""
    for sample in samples:
        tokens = torch.tensor([sample.token_ids], device=model.device)
        if sample.answer_positions:
            before = torch.tensor(sample.answer_positions, device=model.device) - 1
            logits = model(tokens, use_cache=False, logits_to_keep=before).logits[0]  # [answers, V]
            yield replace(sample, answer_ids=tuple(logits.argmax(-1).tolist()))
            continue
        generate: Any = model.generate  # its declared type is a tensor's, by way of nn.Module
        # a config of our own: the model's may ask for penalties or sampling
        greedy = GenerationConfig(
            max_new_tokens=GENERATED_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=model.generation_config.eos_token_id if model.generation_config else None,
            pad_token_id=0,
        )
        written = generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)[0].tolist()
        positions = range(tokens.shape[1], len(written))
        yield replace(
            sample,
            token_ids=tuple(written),
            answer_positions=tuple(positions),
            answer_ids=tuple(written[tokens.shape[1] :]),
        )


def require_answers(samples: Sequence[TextSample], source: str) -> tuple[TextSample, ...]:
    """The samples, each of which must bring its answer.

    Raises:
        DataError: one does not.
    """
    lacking = sum(not sample.answer_positions for sample in samples)
    if lacking:
        raise DataError(
            f"{source}: {lacking} of {len(samples)} samples have no 'answer', which --supervision reference needs; "
            "add answers, or let the model write them with --supervision model"
        )
    return tuple(samples)


def samples_from(content: object) -> tuple[TextSample, ...]:
    """Samples from the JSON form that `dataclasses.asdict` gives."""
    if not isinstance(content, list) or not content:
        raise ValueError("wanted a list of samples")
    return tuple(
        TextSample(
            tuple(row["token_ids"]), tuple(row["answer_positions"]), tuple(row["answer_ids"]), row["truncated_tokens"]
        )
        for row in content
    )
