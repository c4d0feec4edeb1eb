"""What a step costs, fitted to steps that were measured on this device, and the token budget that keeps a time between tokens.

Five numbers say how much work a step is: it, its prompts' tokens, its decodes, keys that decodes read, and pairs of query
and key in prompts, the last two as the spans leave them. A linear model of them is enough to choose chunks by
(so does the branch `niyama_asplos2026` of Sarathi-Serve). No tensor is seen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from moa.errors import UsageError
from moa.runner.account import Footprint
from moa.runner.policies import Job

Float64Array = npt.NDArray[np.float64]
Part = tuple[Job, int]

# Of the time between tokens, what a step may be predicted to take: predictions are off, and so is every clock.
HEADROOM_SHARE = 0.9
# A prompt goes on by at least so many tokens a step, however slow that is, so that nobody starves.
LEAST_CHUNK_TOKENS = 16
# Of each step's error, how much the next prediction is corrected by; an outlier of 10 times counts as one of 2.
LEARNING_SHARE, LARGEST_ERROR_RATIO = 0.05, 2.0


def step_work(parts: Sequence[Part], footprint: Footprint) -> Float64Array:
    """How much work a step is: [5] = 1, prompt tokens, decodes, keys decodes read, pairs in prompts; before it runs."""
    starts = np.array([job.computed_tokens for job, _ in parts], dtype=np.int64)
    counts = np.array([count for _, count in parts], dtype=np.int64)
    decodes = np.array([job.is_decoding for job, _ in parts], dtype=bool)
    pinned = [job.pinned_tokens for job, _ in parts]
    slots = footprint.held(starts, pinned) + footprint.held(starts + counts, pinned)
    keys = slots * (footprint.page_tokens / (2 * footprint.heads))  # read by a query, mean over heads
    return np.array(
        [
            1.0,
            counts[~decodes].sum(),
            decodes.sum(),
            keys[decodes].sum(),
            (keys * counts)[~decodes].sum(),
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """Seconds of a step by its work.

    `seconds_per` [5] is per unit of each number of `step_work`; `worst_error_ratio` is that of the measurements that it was
    fitted to, 0.2 for 20 % too much or too little.
    """

    seconds_per: Float64Array
    worst_error_ratio: float

    @classmethod
    def fit(cls, work: Float64Array, seconds: Float64Array) -> CostModel:
        """The model with the least relative error, none of whose parts is negative; work [N, 5], seconds [N]."""
        scale = work.max(0)
        scale[scale == 0] = 1.0
        per, _ = nnls(work / scale / seconds[:, None], np.ones(len(seconds)))
        per = per / scale
        return cls(per, float(np.abs(work @ per / seconds - 1).max()))

    def seconds(self, work: Float64Array) -> Float64Array:
        """Predicted seconds of steps [..., 5]."""
        predicted: Float64Array = work @ self.seconds_per
        return predicted


class BudgetTuner:
    """Chooses the token budget of each step so that it is predicted to keep a time between tokens.

    Args:
        model: of this model on this device.
        footprint: of requests.
        tbt_s: wanted seconds between two tokens of a request.
        tile_tokens: budgets are a multiple of it.
        most_tokens: largest budget.

    Raises:
        UsageError: the time is not above 0.
    """

    def __init__(
        self, model: CostModel, footprint: Footprint, tbt_s: float, tile_tokens: int = 1, most_tokens: int = 2048
    ) -> None:
        if not tbt_s > 0:
            raise UsageError(f"the time between tokens must be above 0 ms, got {1000 * tbt_s:g}")
        self.model, self.footprint, self.tbt_s = model, footprint, tbt_s
        self.correction_ratio = 1.0  # measured seconds for each that was predicted, as of late
        step = max(tile_tokens, LEAST_CHUNK_TOKENS)
        self._budgets = np.arange(step, max(most_tokens, step) + 1, step, dtype=np.int64)

    def budget(self, running: Sequence[Job], next_waiting: Job | None) -> int:
        """The largest budget whose step keeps the time; with nobody decoding there is none to keep."""
        decodes = [job for job in running if job.is_decoding]
        if not decodes:
            return int(self._budgets[-1])
        prompts = [job for job in running if not job.is_decoding] or ([next_waiting] if next_waiting else [])
        base = step_work([(job, 1) for job in decodes], self.footprint)
        if not prompts:
            return max(len(decodes), int(self._budgets[-1]))
        work = base + self._prompt_work(prompts[0], self._budgets - len(decodes))
        fits = self._budgets[
            (self._budgets > len(decodes))
            & (self.model.seconds(work) * self.correction_ratio <= self.tbt_s * HEADROOM_SHARE)
        ]
        return max(len(decodes) + LEAST_CHUNK_TOKENS, int(fits.max(initial=0)))

    def observe(self, work: Float64Array, seconds: float) -> None:
        """Learn from a step that ran: the machine may be busier, or the texts longer, than when the model was fitted."""
        error = seconds / max(float(self.model.seconds(work)) * self.correction_ratio, 1e-9)
        error = min(max(error, 1 / LARGEST_ERROR_RATIO), LARGEST_ERROR_RATIO)
        self.correction_ratio *= error**LEARNING_SHARE

    def _prompt_work(self, job: Job, counts: npt.NDArray[np.int64]) -> Float64Array:
        """Work of the next `counts` [N] tokens of a prompt: [N, 5], 0 for none."""
        counts = np.clip(counts, 0, None)
        start = np.full_like(counts, job.computed_tokens)
        pinned = [job.pinned_tokens] * len(counts)
        slots = self.footprint.held(start, pinned) + self.footprint.held(start + counts, pinned)
        keys = slots * (self.footprint.page_tokens / (2 * self.footprint.heads))
        zero = np.zeros(len(counts))
        return np.stack([zero, counts, zero, zero, keys * counts], 1)
