"""Made-up reports of any size."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from moa.eval.paired.records import EvalConditions, KvSize, PairedReport, SampleScore, TaskInfo, TaskScores, Variant
from moa.eval.records import Environment


@pytest.fixture(scope="session")
def made_up():
    """`made_up(variants, tasks, lengths, ...)`: a report nobody measured."""
    return _report


DENSE_BYTES_PER_TOKEN = 1000


def _report(
    variants: Sequence[str] = ("dense", "moa", "other", "masked"),
    tasks: Sequence[str] = ("kv", "passkey", "vt"),
    lengths: Sequence[int | None] = (1024, 4096),
    *,
    samples: int = 20,
    losses: Sequence[str] = ("perplexity",),
    depths: bool = True,
    model: str = "a/model",
    masked: Sequence[str] = ("masked",),
) -> PairedReport:
    """Shares of `tasks`, and losses, under every variant; a quarter of the bytes under all but the first.

    Variants get worse by their number, by the length, and in the middle of texts.
    """
    draw = random.Random(0)
    luck = [[draw.random() for _ in range(samples)] for _ in tasks]
    scores = []
    for v, variant in enumerate(variants):
        for n in lengths:
            for task, lucky in zip(tasks, luck, strict=True):
                limits = [
                    0.95 - 0.1 * v - (n or 0) / 1e5 - 0.2 * v * (0.5 - abs(i / samples - 0.5)) for i in range(samples)
                ]
                right = [float(at < limit) for at, limit in zip(lucky, limits, strict=True)]
                scores.append(_scores(variant, task, n, "score", right, depths=depths))
            for loss in losses:
                nats = [2 + at / 3 + 0.1 * v * other for at, other in zip(luck[0], luck[-1], strict=True)]
                scores.append(_scores(variant, loss, n, "nll", nats))
    known = [n for n in lengths if n]
    return PairedReport(
        conditions=_conditions(model, known or [1], samples),
        variants=tuple(_variant(name, known, i, name in masked) for i, name in enumerate(variants)),
        tasks=tuple(
            TaskInfo(name=name, version="1", samples_hash="5a", samples_original=samples, samples_used=samples)
            for name in (*tasks, *losses)
        ),
        scores=tuple(scores),
    )


def _scores(
    variant: str, task: str, length: int | None, metric: str, values: Sequence[float], *, depths: bool = False
) -> TaskScores:
    found = tuple(
        SampleScore(doc_id=i, score=value, prompt=str(i), depth_ratio=(i + 0.5) / len(values) if depths else None)
        for i, value in enumerate(values)
    )
    share = metric == "score"
    return TaskScores(
        variant=variant, task=task, length_tokens=length, metric=metric, higher_is_better=share, bounded=share,
        samples=found,
    )  # fmt: skip


def _variant(name: str, lengths: Sequence[int], number: int, masked: bool) -> Variant:
    def size(n: int) -> KvSize:
        dense = n * DENSE_BYTES_PER_TOKEN
        return KvSize(length_tokens=n, kv_bytes=dense // 4 if number else dense, dense_kv_bytes=dense)

    return Variant(
        name=name,
        attention="torch" if number else "sdpa",
        settings={"window_tokens": "256"} if number else {},
        kv=tuple(map(size, lengths)),
        saves_memory=not masked,
    )


def _conditions(model: str, lengths: Sequence[int], samples: int) -> EvalConditions:
    versions = {"moa": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    return EvalConditions(
        model_name=model, model_fingerprint="f1" * 32, model_revision="main", model_commit="", architecture="Llama",
        parameters=12345, tokenizer_sha256="d1" * 32, versions=versions, chat_template_sha256="",
        environment=Environment(device="cpu (x86_64)", dtype="float32", threads=2, python="3.11.9", **versions),
        lengths_tokens=tuple(lengths), max_length_tokens=max(lengths), context_tokens=None, beyond_context_tokens=0,
        template_tokens=0, batch_size="1", num_samples=samples, data_seed=42, seeds={"random_seed": 7}, limit=None,
        smoke_test=False, options={}, processes=1, date="2026-01-02T03:04:05+00:00",
        command=f"moa eval {model} --plan plan.json", time_s=61.0,
    )  # fmt: skip
