"""Choosing the next token of every request of a step at once: no Python work per token of the vocabulary.

A draw depends on the request's seed and the token's place in its text alone, so that no batch, chunk or preemption
changes it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from moa.runner.request import SamplingParams, TokenLogprobs
from moa.spans import Int64Array

# So many of the likeliest tokens are looked at first where the tail is cut, then eight times as many, and so on.
FIRST_LOOK = 64
# Weights of so many tokens are summed before one of these blocks, and then a token of it, is drawn.
BLOCK_TOKENS = 128


class Said:
    """What a request has said, where penalties want to know: its distinct tokens, and how often its output has each.

    Args:
        prompt: token ids.
        output: token ids.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        distinct = dict.fromkeys(prompt)
        self._place = {token: i for i, token in enumerate(distinct)}
        self._tokens, self._counts = array("q", distinct), array("q", bytes(8 * len(distinct)))
        for token in output:
            self.take(token)

    def take(self, token: int) -> None:
        """Count one more token of the output."""
        place = self._place.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def counted(self) -> tuple[Int64Array, Int64Array]:
        """Tokens of prompt and output, each once, and how often the output has them: [K] and [K], copies."""
        return np.array(self._tokens, dtype=np.int64), np.array(self._counts, dtype=np.int64)


class Bias(NamedTuple):
    """What a request adds to logits of tokens [K]: made once, since there may be thousands."""

    tokens: Int64Array
    values: npt.NDArray[np.float32]

    @classmethod
    def of(cls, params: SamplingParams) -> Bias | None:
        """That of a request; None if it has none."""
        tokens, values = zip(*params.biases, strict=True) if params.biases else ((), ())
        return cls(np.array(tokens, dtype=np.int64), np.array(values, dtype=np.float32)) if tokens else None


@dataclass(slots=True)
class Draw:
    """One row of logits: whose it is and what is wanted of it.

    `place` is the token's place in the text; `said` is there where penalties are, `bias` where biases are.
    """

    params: SamplingParams
    seed: int
    place: int
    said: Said | None = None
    bias: Bias | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of all rows; a row whose logits are no numbers has no token, and `logprobs` of those that wanted them."""

    tokens: list[int | None]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> Sampled:
    """The next tokens; logits float32 [S, V], a row per draw."""
    tuned = _tuned(logits, draws)
    tops = torch.isfinite(tuned.amax(-1)).tolist()  # NaN and +inf pass through penalties and the maximum
    wanted = [i for i, draw in enumerate(draws) if draw.params.logprobs is not None and tops[i]]
    tokens = tuned.argmax(-1)  # [S]
    if drawn := [i for i, draw in enumerate(draws) if not draw.params.is_greedy and tops[i]]:
        at = torch.tensor(drawn, device=logits.device)
        tokens[at] = _draw(tuned[at], [draws[i] for i in drawn])
    chosen = tokens.tolist()
    rows = [draws[i].params.logprobs or 0 for i in wanted]
    told = logprobs_of(logits[wanted], [chosen[i] for i in wanted], rows) if wanted else []
    return Sampled(
        [t if ok else None for t, ok in zip(chosen, tops, strict=True)], dict(zip(wanted, told, strict=True))
    )


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of tokens [S] under logits [S, V], and of the `tops[i]` likeliest of each row."""
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])  # [S, 1]
    # numbers are summed much faster than bools
    likelier = torch.gt(logprobs, own, out=torch.empty_like(logprobs)).sum(-1)
    ranks = (likelier.long() + 1).tolist()
    most = min(max(tops), logits.shape[1])
    values, ids = (x.tolist() for x in logprobs.topk(most, -1))  # [S, most]
    return [
        TokenLogprobs(token, value, rank, tuple(zip(row_ids[:top], row_values[:top], strict=True)))
        for token, value, rank, row_ids, row_values, top in zip(
            tokens, own[:, 0].tolist(), ranks, ids, values, tops, strict=True
        )
    ]


def _tuned(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Logits with penalties and biases; the given ones are left as they are."""
    penal = [i for i, draw in enumerate(draws) if draw.said is not None]
    biased = [(i, draw.bias) for i, draw in enumerate(draws) if draw.bias is not None]
    if not penal and not biased:
        return logits
    tuned = logits.clone()
    if penal:
        _penalise(tuned, penal, [draws[i] for i in penal])
    if biased:
        row, token = _places([i for i, _ in biased], [bias.tokens for _, bias in biased], logits.device)
        tuned[row, token] += torch.from_numpy(np.concatenate([bias.values for _, bias in biased])).to(logits)
    return tuned


def _penalise(logits: torch.Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> None:
    """Penalties on what `draws` have said, in place in `rows` of logits [S, V]; the other tokens are not touched."""
    said = [draw.said.counted() for draw in draws if draw.said is not None]
    lengths = [len(tokens) for tokens, _ in said]

    def per_token(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(logits)  # [K]

    row, token = _places(rows, [tokens for tokens, _ in said], logits.device)
    count = torch.from_numpy(np.concatenate([counts for _, counts in said])).to(logits)  # [K]
    repetition = per_token([draw.params.repetition_penalty for draw in draws])
    presence = per_token([draw.params.presence_penalty for draw in draws])
    frequency = per_token([draw.params.frequency_penalty for draw in draws])
    old = logits[row, token]
    new = torch.where(old > 0, old / repetition, old * repetition)
    logits[row, token] = new - presence * (count > 0) - frequency * count


def _places(rows: Sequence[int], tokens: Sequence[Int64Array], device: torch.device) -> torch.Tensor:
    """Row and column of every token of each row, one row's after the other's: [2, K]."""
    repeated = np.repeat(np.array(rows, dtype=np.int64), [len(each) for each in tokens])
    return torch.from_numpy(np.stack([repeated, np.concatenate(tokens)])).to(device)


def _columns(like: torch.Tensor, rows: list[list[float]]) -> tuple[torch.Tensor, ...]:
    return torch.tensor(rows, dtype=like.dtype, device=like.device)[:, :, None].unbind(1)


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One token per row [S] by inverting the distribution at a number of the request's own."""
    (temperature,) = _columns(logits, [[draw.params.temperature] for draw in draws])
    # the largest is 0, so that no temperature makes it infinite
    weights = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)  # [S, V]
    u = torch.from_numpy(uniforms([d.seed for d in draws], [d.place for d in draws])).to(logits.device)  # [S]
    cut = [i for i, draw in enumerate(draws) if draw.params.cuts_tail]
    free = [i for i, draw in enumerate(draws) if not draw.params.cuts_tail]
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    if free:
        tokens[free] = _invert_in_blocks(_rows(weights, free), u[free])
    if cut:
        likeliest, ids = _likeliest(_rows(weights, cut), [draws[i] for i in cut])  # [S', K]
        tokens[cut] = ids.gather(1, _invert(likeliest, u[cut] * likeliest.cumsum(-1)[:, -1])[:, None])[:, 0]
    return tokens


def _rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return x if len(rows) == len(x) else x[rows]


def _invert_in_blocks(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The token at the share `u` [S] of all weights [S, V], float32: [S]. First its block, then its place there."""
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK_TOKENS)).view(len(weights), -1, BLOCK_TOKENS)  # [S, B, T]
    sums = blocks.sum(-1).double()  # [S, B]
    point = u * sums.sum(-1)
    block = _invert(sums, point)[:, None]  # [S, 1]
    before = (sums.cumsum(-1) - sums).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK_TOKENS))[:, 0].double()  # [S, T]
    return block[:, 0] * BLOCK_TOKENS + _invert(inside, (point - before[:, 0]).clamp_min(0))


def _invert(weights: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """The first column up to which weights [S, K] add up to more than `point` [S]: [S], never one of weight 0."""
    at = torch.searchsorted(weights.cumsum(-1), point[:, None], right=True)  # [S, 1]
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(at, last)[:, 0]


def _likeliest(weights: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, float64, and ids of the likeliest tokens, falling, equal ones in order of id [S, K]; 0 if they are cut off.

    How many are looked at depends on all rows, what is kept of a row on itself alone: nothing as light as the last one
    seen is kept, because others of that weight may not have been seen.
    """
    size = weights.shape[1]
    count = min(size, max(FIRST_LOOK, *(draw.params.top_k + 1 for draw in draws)))
    while True:
        ids = weights.topk(count, -1, sorted=False).indices.sort(-1).values
        likeliest, order = torch.sort(weights.gather(1, ids), dim=-1, descending=True, stable=True)
        ids, likeliest = ids.gather(1, order), likeliest.double()
        kept = _kept(likeliest, draws)
        if count == size or not bool((kept & (likeliest == likeliest[:, -1:])).any()):
            return likeliest * kept, ids
        count = min(size, 8 * count)


def _kept(weights: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Which of the tokens, likeliest first [S, V], top-k, top-p and min-p leave; always the first.

    All sums are running ones: they do not depend on how many tokens follow.
    """
    limits = [[float(d.params.top_k or math.inf), d.params.top_p, d.params.min_p] for d in draws]
    top_k, top_p, min_p = _columns(weights, limits)  # [S, 1] each
    place = torch.arange(weights.shape[1], device=weights.device)
    kept = place < top_k
    left = weights * kept
    sums = left.cumsum(-1)
    # Of those that top-k leaves; without it, of all tokens, whose probabilities add up to 1.
    sums, within = (torch.where(torch.isinf(top_k), x, x / sums[:, -1:]) for x in (sums, left))
    before = sums - within  # probability of all that are likelier
    kept = kept & ((before < top_p) | (top_p >= 1)) & (weights >= min_p * weights[:, :1])
    return kept | (place == 0)


def uniforms(seeds: Sequence[int], places: Sequence[int]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one per pair: two rounds of SplitMix64 (Steele et al., OOPSLA 2014), the same everywhere."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        state = _mix(np.array(seeds, dtype=np.uint64) + _GOLDEN)
        state = _mix(state + _GOLDEN * (np.array(places, dtype=np.uint64) + np.uint64(1)))
    numbers: npt.NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
