"""The run: every case by every subject, checked before it is timed, a row as soon as it is known."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from moa.eval.gpu import check, work
from moa.eval.gpu.cases import Case
from moa.eval.gpu.inputs import Inputs, make_inputs, sets_wanted
from moa.eval.gpu.machine import Clocks, Machine, Rates, clocks, now
from moa.eval.gpu.rows import Row, RowFile
from moa.eval.gpu.subject import Built, Subject
from moa.eval.gpu.timing import FEWEST_TURNS, TURNS_S, Clock, Timing, first_line, measure

log = logging.getLogger("moa")
# Subjects that take longer to get ready wait until all others had their turn with a tier of cases.
QUICK_S = 5.0
# For the budget only: what any kernel reaches, operations and bytes per second.
SLOW_FLOPS, SLOW_BYTES = 100e12, 0.5e12
EVERY_CASE = "every case"
DIED = "the process ended while this ran"


class DeviceLost(Exception):
    """The device is in an error state that only a new process gets out of."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a run measures with.

    Args:
        device: where tensors lie.
        clock: what measures there.
        machine: its description, which rows are marked with.
        rates: its measured rates, which rows are held against.
        file: where rows go.
        deadline_s: no subject begins that would not be done by then, `time.monotonic()`.
        dtype: of queries, keys and values.
        tell: hears of every row.
    """

    device: torch.device
    clock: Clock
    machine: Machine
    rates: Rates
    file: RowFile
    deadline_s: float = float("inf")
    dtype: torch.dtype = torch.bfloat16
    tell: Callable[[Row], None] = lambda row: None
    _checked: dict[tuple[str, ...], str] = field(default_factory=dict)

    def run(self, tiers: Sequence[Sequence[Case]], subjects: Sequence[Subject]) -> None:
        """Measure what is not in the file yet and what there is time for.

        Raises:
            DeviceLost: a kernel left the device unusable; its row says so. Going on takes a new process.
        """
        there = [subject for subject in subjects if self._is_there(subject)]
        for case, some in schedule(tiers, there):
            pending = [s for s in some if not self.file.is_done(case.name, s.name)]
            for subject in pending:
                if reason := subject.refuses(case):
                    self._add(row_of(case, subject, "unsupported", reason=reason))
            left = [s for s in pending if not self.file.is_done(case.name, s.name) and self._fits(case, s)]
            if left:
                self._case(case, left)

    def _is_there(self, subject: Subject) -> bool:
        """Whether a subject can run; if not, one row says why."""
        reason = subject.missing()
        if reason and reason != self.file.reason(EVERY_CASE, subject.name):
            self._add(missing_row(subject, reason))
        return not reason

    def _case(self, case: Case, subjects: Sequence[Subject]) -> None:
        try:
            sets = sets_wanted(case, self.machine.l2_bytes, self.machine.memory_bytes)
            inputs = make_inputs(case, sets, self.device, self.dtype)
        except Exception as error:  # noqa: BLE001 - too large for the device, or the device is gone
            for subject in subjects:
                self._add(row_of(case, subject, "failed", reason=first_line(error)))
            self._recover()
            return
        for subject in subjects:
            self._add(row_of(case, subject, "failed", reason=DIED))  # stays if the process ends here
            self._add(self._row(case, subject, inputs))
            self._recover()

    def _row(self, case: Case, subject: Subject, inputs: Sequence[Inputs]) -> Row:
        """Check, time, describe; whatever a subject raises becomes the reason in its row."""
        try:
            return self._measured(case, subject, inputs)
        except Exception as error:
            log.info("%s, %s: failed", case.name, subject.name, exc_info=True)
            return row_of(case, subject, "failed", reason=first_line(error))

    def _measured(self, case: Case, subject: Subject, inputs: Sequence[Inputs]) -> Row:
        if reason := self._small_checks(case, subject):
            return row_of(case, subject, "wrong", reason=reason)
        started = time.monotonic()
        built = subject.build(case, inputs)
        error, limit = self._error(case, subject, inputs, built), check.tolerance(case.kv, self.dtype)
        setup_s = time.monotonic() - started
        row = replace(
            row_of(case, subject, "ok"),
            error=error, setup_s=setup_s, buffer_sets=len(inputs), stored_kv_bytes=built.stored_kv_bytes,
        )  # fmt: skip
        if built.error is not None:  # no attention, so none of its work
            row = replace(row, flops=None, kv_bytes=None)
        if not error <= limit:
            return replace(row, status="wrong", reason=check.describe(case, error, limit))
        before = clocks(self.device)
        timing = measure(built.calls, self.clock)
        return timed(row, timing, self.rates, before, clocks(self.device))

    def _error(self, case: Case, subject: Subject, inputs: Sequence[Inputs], built: Built) -> float:
        """Of the first turn: some rows of the first and the last set."""
        if built.error is not None:
            return built.error()
        error = 0.0
        for i, (one, call) in enumerate(zip(inputs, built.calls, strict=True)):
            out = call()
            if i in (0, len(inputs) - 1):
                error = max(error, check.worst_error(case, one, built.outputs(out), subject.mask, every_row=False))
        return error

    def _small_checks(self, case: Case, subject: Subject) -> str:
        """Every row of small cases of the same kind, once per kernel of ours; the reason if it is wrong."""
        if not subject.is_ours:
            return ""
        key = (subject.name, case.kind, case.heads.name, case.kv)
        if key not in self._checked:
            self._checked[key] = self._wrong_at(check.small_cases(case), subject)
        return self._checked[key]

    def _wrong_at(self, cases: Sequence[Case], subject: Subject) -> str:
        for case in cases:
            (inputs,) = make_inputs(case, 1, self.device, self.dtype)
            built = subject.build(case, [inputs])
            if built.error is not None:
                error = built.error()
            else:
                error = check.worst_error(case, inputs, built.outputs(built.calls[0]()), subject.mask, every_row=True)
            limit = check.tolerance(case.kv, self.dtype)
            if not error <= limit:
                return check.describe(case, error, limit)
        return ""

    def _fits(self, case: Case, subject: Subject) -> bool:
        operations, held = work.work_under(case, subject.mask)
        once = operations / SLOW_FLOPS + (held + work.query_bytes(case)) / SLOW_BYTES
        sets = sets_wanted(case, self.machine.l2_bytes, self.machine.memory_bytes)
        needed = subject.needs_s + max(TURNS_S, once * sets * FEWEST_TURNS)
        return time.monotonic() + needed < self.deadline_s

    def _add(self, row: Row) -> None:
        row = replace(row, device=self.machine.device, date=now())
        self.file.add(row)
        if row.reason != DIED:
            self.tell(row)

    def _recover(self) -> None:
        """Give memory back, and find out whether the device still works."""
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from error


def schedule(tiers: Sequence[Sequence[Case]], subjects: Sequence[Subject]) -> Iterator[tuple[Case, Sequence[Subject]]]:
    """Tier by tier, quick subjects on all its cases first, then those that compile for long."""
    for tier in tiers:
        for some in ([s for s in subjects if s.needs_s <= QUICK_S], [s for s in subjects if s.needs_s > QUICK_S]):
            yield from ((case, some) for case in tier if some)


def row_of(case: Case, subject: Subject, status: str, reason: str = "") -> Row:
    """What is known of a subject in a case before anything runs."""
    flops, kv_bytes = work.work_under(case, subject.mask)
    return Row(
        case=case.name, kind=case.kind, heads=case.heads.name, plan=case.pattern.name, published=case.pattern.published,
        tokens=case.tokens, batch=case.batch, chunk=case.chunk, prompts=case.prompts, kv=case.kv,
        subject=subject.name, mask=subject.mask, status=status, reason=reason, flops=flops, kv_bytes=kv_bytes,
        dense_flops=float(work.dense_flops(case)), dense_kv_bytes=float(work.dense_kv_bytes(case)),
    )  # fmt: skip


def missing_row(subject: Subject, reason: str) -> Row:
    """That a subject cannot run here at all."""
    return Row(
        case=EVERY_CASE, kind="", heads="", plan="", published=False, tokens=0, batch=0, chunk=0, prompts=0, kv="",
        subject=subject.name, mask=subject.mask, status="missing", reason=reason,
    )  # fmt: skip


def timed(row: Row, timing: Timing, rates: Rates, before: Clocks, after: Clocks) -> Row:
    """The row with its times, and its work per second beside the machine's rates."""
    row = replace(
        row,
        reason=timing.note, median_us=timing.median_s * 1e6, low_us=timing.low_s * 1e6, high_us=timing.high_s * 1e6,
        turns=timing.turns, launch=timing.launch, sm_mhz_before=before.sm_mhz, sm_mhz_after=after.sm_mhz, power_w_after=after.power_w,
        temperature_c_after=after.temperature_c,
    )  # fmt: skip
    if row.flops is None or row.kv_bytes is None:
        return row
    flops_per_s, bytes_per_s = row.flops / timing.median_s, row.kv_bytes / timing.median_s
    return replace(
        row,
        tflops=flops_per_s / 1e12, gb_per_s=bytes_per_s / 1e9,
        of_matmul_ratio=flops_per_s / rates.matmul_flops_per_s, of_copy_ratio=bytes_per_s / rates.copy_bytes_per_s,
    )  # fmt: skip
