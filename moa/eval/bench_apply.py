"""What it costs to be attached: prefill and decode under a plan beside stock transformers, in turns within one run, on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, Qwen2Config

from moa import demo
from moa.eval.speed import kv_bytes
from moa.hf.apply import Attachment, apply
from moa.hf.load import load_model
from moa.hf.shape import model_shape
from moa.plan import Plan

DENSE, QUARTER = "dense", "25 %"
DENSITIES = {DENSE: 1.0, QUARTER: 0.25}
SHIPPED, HALF_B, ATTENTION = "shipped", "0.5B", "attention"
# Decode steps take milliseconds: so many per turn of a prefill, and prefills of long texts once.
STEPS_PER_TURN, LONGEST_REPEATED = 12, 4096
VOCABULARY = 256  # of random models and prompts; a larger one would hide the wrapper's cost


@dataclass(frozen=True, slots=True)
class Shape:
    """A model that is measured, and the longest text it is measured with."""

    name: str
    note: str
    longest_tokens: int
    make: Callable[[], PreTrainedModel]


@dataclass(frozen=True, slots=True)
class Row:
    """A model under a plan at one length: CPU seconds of all threads, wall seconds, and KV bytes at the end.

    Quantiles are over turns, of the ratios of `moa` to stock within each turn.
    """

    model: str
    plan: str
    kind: str
    tokens: int
    turns: int
    stock_s: float
    moa_s: float
    stock_wall_s: float
    moa_wall_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    stock_kv_bytes: int
    moa_kv_bytes: int


def shapes(longest_tokens: int) -> tuple[Shape, ...]:
    """The models, each with the longest text it is measured with."""
    repeated = min(longest_tokens, LONGEST_REPEATED)
    return (
        Shape(SHIPPED, "the model that ships with moa", repeated, lambda: load_model(demo.resolve("demo"))),
        Shape(
            HALF_B,
            "random, 2 layers of Qwen2.5-0.5B's widths: 14 query and 2 KV heads of 64, MLP of 4,864",
            repeated,
            lambda: _random(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2),
        ),
        Shape(
            ATTENTION,
            "random, 2 layers dominated by attention: 8 query and 8 KV heads of 64, MLP of 512",
            longest_tokens,
            lambda: _random(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8),
        ),
    )


def _random(**sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 1 << 17}
    config = Qwen2Config(**fields, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return model


def bench_apply(lengths: Sequence[int], turns: int, progress: Callable[[str, int, int], None]) -> list[Row]:
    """Every model at every length up to its longest, under a dense plan and one of 25 %."""
    wanted = [(shape, [n for n in lengths if n <= shape.longest_tokens]) for shape in shapes(max(lengths))]
    total, rows = len(DENSITIES) * sum(len(mine) for _, mine in wanted), []
    for shape, mine in wanted:
        model = shape.make()
        for plan, density in DENSITIES.items():
            with apply(model, Plan.uniform(model_shape(model), 0, density)) as attached:
                for n in mine:
                    rows += list(_measure(model, attached, (shape.name, plan), n, turns))
                    progress("attached models", len(rows) // 2, total)
    return rows


@dataclass(slots=True)
class _Side:
    """One way to run a model, its cache and next token, and what its turns took."""

    attached: Attachment
    is_stock: bool
    cache: Cache
    token: torch.Tensor
    prefills: list[tuple[float, float]]
    decodes: list[tuple[float, float]]

    @torch.no_grad()
    def run(self, model: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, float]:
        """One forward call on `tokens` [1, T]: CPU and wall seconds; keeps its greedy token."""
        if self.is_stock:
            with self.attached.disabled():
                return self._timed(model, tokens)
        return self._timed(model, tokens)

    def _timed(self, model: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        logits = model(tokens, past_key_values=self.cache, logits_to_keep=1).logits  # [1, 1, V]
        taken = time.process_time() - cpu, time.perf_counter() - wall
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        return taken

    def restart(self, model: PreTrainedModel) -> None:
        """An empty cache."""
        self.cache = DynamicCache(config=model.config) if self.is_stock else self.attached.new_cache()


def _measure(
    model: PreTrainedModel, attached: Attachment, names: tuple[str, str], n_tokens: int, turns: int
) -> Iterator[Row]:
    """Prefills in turns, the first of short ones left out; then single tokens in turns behind the last prefill's cache."""
    sides = [_Side(attached, stock, Cache(layers=[]), torch.empty(0), [], []) for stock in (True, False)]
    prompt = torch.randint(3, VOCABULARY, (1, n_tokens), generator=torch.Generator().manual_seed(0))  # [1, N]
    repeats = turns + 1 if n_tokens <= LONGEST_REPEATED else 1
    for turn in range(repeats):
        for side in sides[:: 1 if turn % 2 else -1]:
            side.restart(model)
            side.prefills.append(side.run(model, prompt))
    for turn in range(1 + STEPS_PER_TURN * turns):
        for side in sides[:: 1 if turn % 2 else -1]:
            side.decodes.append(side.run(model, side.token))
    warm = 1 if repeats > 1 else 0
    yield _row(names, "prefill", n_tokens, sides, [side.prefills[warm:] for side in sides])
    yield _row(names, "decode", n_tokens, sides, [side.decodes[1:] for side in sides])


def _row(
    names: tuple[str, str],
    kind: str,
    n_tokens: int,
    sides: Sequence[_Side],
    times: Sequence[Sequence[tuple[float, float]]],
) -> Row:
    stock, moa = (np.array(mine) for mine in times)  # CPU and wall seconds, [turns, 2]
    ratio, low, high = (float(x) for x in np.quantile(moa[:, 0] / stock[:, 0], (0.5, 0.2, 0.8)))
    (stock_s, stock_wall), (moa_s, moa_wall) = (np.median(x, 0).tolist() for x in (stock, moa))
    held = [kv_bytes(side.cache) for side in sides]
    return Row(*names, kind, n_tokens, len(stock), stock_s, moa_s, stock_wall, moa_wall, ratio, low, high, *held)


def break_even_tokens(rows: Sequence[Row], model: str) -> int | None:
    """The least measured length from which on a decode step at 25 % takes no longer than a stock one; None if there is none."""
    mine = sorted((r.tokens, r.ratio) for r in rows if (r.model, r.plan, r.kind) == (model, QUARTER, "decode"))
    found = None
    for tokens, ratio in reversed(mine):
        if ratio > 1:
            break
        found = tokens
    return found
