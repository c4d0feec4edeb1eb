"""The texts that a job calibrates and validates on, and the record of them that goes into the plan."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moa.local_paths import public_name
from moa.plan import Calibration, CalibrationLength
from moa.profile.chat import Chat
from moa.profile.data import TextSample, digest, require_answers
from moa.profile.dataset import Row, read_rows, split_rows
from moa.profile.synthetic import SYNTHETIC, synthetic_samples
from moa.profile.texts import Fitting, row_samples
from moa.settings import CompressSettings
from moa.stages import key_of

SHOWN_TOKENS = 40
log = logging.getLogger("moa")


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where texts come from: two disjoint sets of rows, or none for synthetic texts; the digest of the file, if one."""

    settings: CompressSettings
    chat: Chat
    calibration_rows: Sequence[Row] = ()
    validation_rows: Sequence[Row] = ()
    file_sha256: str = ""

    @classmethod
    def open(cls, tokenizer: PreTrainedTokenizerBase, settings: CompressSettings) -> TextSource:
        """Read the data set, if there is one.

        Raises:
            UsageError: a chat template is asked for and there is none, or the data's options do not go together.
            DataError: the data set cannot be used.
        """
        chat = Chat.of(tokenizer, settings.chat_template)
        if settings.dataset == SYNTHETIC:
            return cls(settings, chat)
        rows = read_rows(settings.dataset, settings.dataset_config, settings.dataset_split, settings.columns)
        return cls(settings, chat, *split_rows(rows, settings.dataset), _file_digest(Path(settings.dataset)))

    def samples(self, n_tokens: int, count: int, seed: int, *, validate: bool = False) -> tuple[TextSample, ...]:
        """Up to `count` texts of one length, with the data's answers where these are asked for or found by design.

        Raises:
            DataError: none fits the length, or reference answers are wanted and lacking.
        """
        settings = self.settings
        if settings.dataset == SYNTHETIC:
            shortest = n_tokens // 2 + 1 if settings.mixed_lengths and not validate else n_tokens
            tokenizer = self.chat.tokenizer
            return synthetic_samples(tokenizer, n_tokens, count, seed, self.chat, shortest_tokens=shortest)
        rows = self.validation_rows if validate else self.calibration_rows
        fitting = Fitting(n_tokens, settings.supervision == "reference", settings.max_answer_tokens)
        samples = row_samples(rows, self.chat, fitting, count, seed, settings.dataset)
        self._report(samples, n_tokens, count)
        return require_answers(samples, settings.dataset) if fitting.reference else samples

    def shown(self, sample: TextSample) -> str:
        """The head and the tail of a text as the model sees it."""
        ids = list(sample.token_ids)
        if len(ids) <= 2 * SHOWN_TOKENS:
            return str(self.chat.tokenizer.decode(ids))
        head, tail = (self.chat.tokenizer.decode(part) for part in (ids[:SHOWN_TOKENS], ids[-SHOWN_TOKENS:]))
        return f"{head} [... {len(ids) - 2 * SHOWN_TOKENS} tokens ...] {tail}"

    def record(self, samples: Mapping[int, Sequence[TextSample]]) -> Calibration:
        """What the plan says about its calibration texts."""
        settings = self.settings
        return Calibration(
            dataset=public_name(settings.dataset),
            dataset_sha256=key_of(**{str(n): digest(texts) for n, texts in samples.items()}),
            samples_per_length=max(len(texts) for texts in samples.values()),
            lengths_tokens=tuple(samples),
            seed=settings.seed,
            estimator=settings.estimator,
            supervision=settings.supervision,
            dataset_config=settings.dataset_config or "",
            dataset_split=settings.dataset_split or "",
            columns=settings.columns,
            dataset_file_sha256=self.file_sha256,
            weighting=settings.weighting,
            mixed_lengths=settings.mixed_lengths or settings.dataset != SYNTHETIC,
            chat_template_sha256=self.chat.sha256,
            max_answer_tokens=settings.max_answer_tokens,
            rounds=settings.rounds,
            lengths=tuple(_counted(n, texts, settings.num_samples) for n, texts in samples.items()),
        )

    def _report(self, samples: Sequence[TextSample], n_tokens: int, wanted: int) -> None:
        if len(samples) < wanted:
            log.warning("%d of %d texts wanted are long enough for %d tokens", len(samples), wanted, n_tokens)
        cut = [sample.truncated_tokens for sample in samples if sample.truncated_tokens]
        if cut:
            log.warning(
                "%d of %d texts were cut to fit %d tokens, by %d tokens in all",
                len(cut), len(samples), n_tokens, sum(cut),
            )  # fmt: skip


def _file_digest(path: Path) -> str:
    """SHA-256 of a data set's file; "" of what is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _counted(n_tokens: int, samples: Sequence[TextSample], wanted: int) -> CalibrationLength:
    return CalibrationLength(
        length_tokens=n_tokens,
        samples=len(samples),
        wanted_samples=wanted,
        shortest_tokens=min(len(sample.token_ids) for sample in samples),
        truncated_samples=sum(sample.truncated_tokens > 0 for sample in samples),
        truncated_tokens=sum(sample.truncated_tokens for sample in samples),
        answer_tokens=sum(len(sample.answer_positions) for sample in samples),
    )


def summary(calibration: Calibration) -> str:
    """The record in a few words: what a user should know before trusting the plan."""
    template = "the chat template applied" if calibration.chat_template_sha256 else "no chat template"
    parts = [f"Calibrated on {calibration.dataset}, {calibration.supervision} answers, {template}"]
    for at in calibration.lengths:
        short = "" if at.samples == at.wanted_samples else f" of {at.wanted_samples} wanted"
        cut = f", {at.truncated_samples} cut by {at.truncated_tokens} tokens in all" if at.truncated_samples else ""
        parts.append(f"{at.samples} texts{short} at {at.length_tokens} tokens{cut}")
    return "; ".join(parts) + "."
