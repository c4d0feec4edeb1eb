"""What the kernels are meant to reach, as data, and what rows say of each: met, missed or not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moa.eval.gpu.rows import Row, latest

OURS, SERIAL, PLANNER, WHOLE_STEP = "moa", "moa, serial", "moa, planner", "moa, whole step"
TICKETS = "moa, tickets"
SDPA_FLASH, FLEX, FLASHINFER_EQUAL = "SDPA flash", "flex_attention", "FlashInfer, equal windows"
# Least ideal gain of a mixed step from which on it is meant to win.
IDEAL_GAIN = 1.3
MB = 1e6


class Measured(NamedTuple):
    """One figure that a target is held against, and the case it is of."""

    value: float
    case: str


@dataclass(frozen=True, slots=True)
class Target:
    """A quantity with its three levels; the worst case counts.

    Args:
        name: number of the target and what is meant.
        unit: of the levels.
        minimum, good, stretch: levels; all are for one NVIDIA H200.
        find: the figures that rows have for it.
        more_is_better: whether a level is a floor or a ceiling.
    """

    name: str
    unit: str
    minimum: float
    good: float
    stretch: float
    find: Callable[[Sequence[Row]], Iterator[Measured]]
    more_is_better: bool = True

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Hold the worst figure against the levels."""
        found = list(self.find(list(latest(list(rows)))))
        if not found:
            return Verdict(self, None, 0, "not measured")
        worst = (min if self.more_is_better else max)(found, key=lambda m: m.value)
        reached = [name for name in ("minimum", "good", "stretch") if self._holds(worst.value, getattr(self, name))]
        return Verdict(self, worst, len(found), f"met ({reached[-1]})" if reached else "missed")

    def _holds(self, value: float, level: float) -> bool:
        return value >= level if self.more_is_better else value <= level


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, its worst figure if there is any, of how many, and what that makes of it."""

    target: Target
    worst: Measured | None
    cases: int
    verdict: str


Where = Callable[[Row], bool]
Find = Callable[[Sequence[Row]], Iterator[Measured]]


def _ok(rows: Sequence[Row], subject: str, where: Where) -> Iterator[Row]:
    return (row for row in rows if row.status == "ok" and row.subject == subject and where(row))


def _twin(rows: Sequence[Row], row: Row, subject: str, **changes: object) -> Row | None:
    """The row of `subject` in the same case, but for `changes`."""
    keys = ("kind", "heads", "plan", "tokens", "batch", "chunk", "prompts", "kv")
    wanted = {key: getattr(row, key) for key in keys} | changes
    return next(_ok(rows, subject, lambda other: all(getattr(other, k) == v for k, v in wanted.items())), None)


def _plain(value: Callable[[Row], float | None], where: Where, subject: str = OURS) -> Find:
    """A figure of every row of `subject` that qualifies."""

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        for row in _ok(rows, subject, where):
            if (found := value(row)) is not None:
                yield Measured(found, row.case)

    return find


def _beside(value: Callable[[Row, Row], float | None], where: Where, subject: str = OURS, **changes: object) -> Find:
    """A figure of every row of ours that qualifies, with its twin."""

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        for row in _ok(rows, OURS, where):
            other = _twin(rows, row, subject, **changes)
            if other is not None and (found := value(row, other)) is not None:
                yield Measured(found, row.case)

    return find


def _chunk_of_whole(rows: Sequence[Row]) -> Iterator[Measured]:
    for row in _ok(rows, OURS, lambda r: r.kind == "chunk" and r.plan == "dense" and r.tokens >= 32768):
        whole = _twin(rows, row, OURS, kind="prefill", chunk=0, batch=1)
        if whole is not None:
            yield Measured((row.tflops or 0) / (whole.tflops or 1), row.case)


def _hybrid_gain(least_ideal: float) -> Find:
    """Serial time over mixed time, where the sides' own times allow a gain of at least `least_ideal`."""

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        for row in _ok(rows, OURS, lambda r: r.kind == "hybrid"):
            serial, ideal = _twin(rows, row, SERIAL), ideal_gain(rows, row)
            if serial is not None and (least_ideal <= 1 or (ideal is not None and ideal >= least_ideal)):
                yield Measured(_us(serial) / _us(row), row.case)

    return find


def ideal_gain(rows: Sequence[Row], row: Row) -> float | None:
    """What a mixed step could gain at most: the sum of its sides' own times over the longer one; None if not measured."""
    prompts = _twin(rows, row, OURS, kind="chunk", batch=row.prompts, prompts=0)
    decodes = _twin(rows, row, OURS, kind="decode", chunk=0, prompts=0)
    if prompts is None or decodes is None:
        return None
    times = _us(prompts), _us(decodes)
    return sum(times) / max(times)


def _us(row: Row) -> float:
    if row.median_us is None:
        raise ValueError(f"{row.case}: {row.subject} has no time")
    return row.median_us


def _speed_up(row: Row, other: Row) -> float:
    return _us(other) / _us(row)


def _efficiency(row: Row, dense: Row) -> float | None:
    """Useful operations per second over those of the dense kernel."""
    return row.tflops / dense.tflops if row.tflops and dense.tflops else None


def _of_ideal(row: Row, dense: Row) -> float | None:
    """Gain in time over gain in bytes."""
    return _us(dense) / _us(row) * row.kv_bytes / dense.kv_bytes if row.kv_bytes and dense.kv_bytes else None


def _spare_pages(row: Row) -> float | None:
    """Stored tokens beyond the live ones per head and sequence, in pages of 64."""
    if row.stored_kv_bytes is None or row.kv_bytes is None or not row.dense_kv_bytes:
        return None
    page = 64 * row.dense_kv_bytes / row.tokens  # one of every head and sequence
    return (row.stored_kv_bytes - row.kv_bytes) / page


def _is_prefill(plan: str | None, least_tokens: int, most_tokens: int = 1 << 40) -> Where:
    """Prefill from `least_tokens` on under the plan of that name, or under published rules for None."""

    def where(row: Row) -> bool:
        named = row.published if plan is None else row.plan == plan
        return row.kind == "prefill" and named and least_tokens <= row.tokens <= most_tokens

    return where


def _is_decode(least_bytes: float, most_bytes: float = 1e15) -> Where:
    return lambda r: r.kind == "decode" and r.kv == "bf16" and least_bytes <= (r.kv_bytes or 0) <= most_bytes


def _drops_half(row: Row) -> bool:
    live, all_bytes = row.kv_bytes or 0, row.dense_kv_bytes or 1
    return _is_decode(64 * MB)(row) and 0.35 <= live / all_bytes <= 0.65


_DENSE = {"plan": "dense"}
TARGETS = (
    Target("T1 dense prefill, 8k and longer", "TFLOP/s", 400, 450, 560, _plain(lambda r: r.tflops, _is_prefill("dense", 8192))),
    Target("T2a the same over SDPA flash", "x", 1.0, 1.15, 1.3, _beside(_speed_up, _is_prefill("dense", 8192), SDPA_FLASH)),
    Target("T2b the same over flex_attention", "x", 1.0, 1.15, 1.3, _beside(_speed_up, _is_prefill("dense", 8192), FLEX)),
    Target(
        "T3a prefill under MoA's rules, efficiency over dense, 8k", "share", 0.80, 0.88, 0.95,
        _beside(_efficiency, _is_prefill(None, 8192, 8192), **_DENSE),
    ),
    Target(
        "T3b the same, 16k", "share", 0.88, 0.93, 0.95, _beside(_efficiency, _is_prefill(None, 16384, 16384), **_DENSE)
    ),
    Target(
        "T3c the same, 32k and longer", "share", 0.93, 0.96, 0.97, _beside(_efficiency, _is_prefill(None, 32768), **_DENSE)
    ),
    Target(
        "T4 prefill with windows of 1,024, efficiency over dense, 16k and longer", "share", 0.70, 0.80, 0.85,
        _beside(_efficiency, _is_prefill("window 1,024", 16384), **_DENSE),
    ),
    Target("T5 dense chunks over 32k and more, rate over whole prefill", "share", 0.85, 0.92, 0.97, _chunk_of_whole),
    Target(
        "T6 decode, 256 MB of keys and values and more", "of copy", 0.80, 0.88, 0.93,
        _plain(lambda r: r.of_copy_ratio, _is_decode(256 * MB)),
    ),
    Target(
        "T7 decode, about 64 MB", "of copy", 0.55, 0.65, 0.75, _plain(lambda r: r.of_copy_ratio, _is_decode(48 * MB, 96 * MB))
    ),
    Target("T8 decode, hardly any keys", "µs", 15, 10, 7, _plain(lambda r: r.median_us, _is_decode(0, MB)), False),
    Target(
        "T9 decode at about half the density, gain over dense of the ideal one", "share", 0.90, 0.95, 0.98,
        _beside(_of_ideal, _drops_half, **_DENSE),
    ),
    Target("T10 plan of splits for all layers", "µs", 15, 5, 5, _plain(lambda r: r.median_us, lambda r: True, PLANNER), False),
    Target(f"T11 mixed steps over serial launches, ideal gain {IDEAL_GAIN} and more", "x", 1.10, 1.20, 1.30, _hybrid_gain(IDEAL_GAIN)),
    Target("T12 mixed steps over serial launches, always", "x", 0.97, 1.0, 1.0, _hybrid_gain(1.0)),
    Target(
        "T13 FP8 over bf16 decode, 512 MB and more", "x", 1.3, 1.5, 1.75,
        _beside(lambda row, fp8: _us(row) / _us(fp8), _is_decode(512 * MB), kv="fp8"),
    ),
    Target("T14 stored tokens beyond the spans", "pages per head", 1, 1, 0.5, _plain(_spare_pages, _is_decode(0), WHOLE_STEP), False),
    Target("T15 MoA's rules over flex_attention, every case", "x", 1.0, 1.0, 1.15, _beside(_speed_up, lambda r: r.published, FLEX)),
    Target(
        "T16 MoA's rules over FlashInfer's equal windows, every case", "x", 1.0, 1.0, 1.15,
        _beside(_speed_up, lambda r: r.published, FLASHINFER_EQUAL),
    ),
)  # fmt: skip


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every target's verdict, in order."""
    return [target.judge(rows) for target in TARGETS]
