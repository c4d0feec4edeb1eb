"""How far a profile can be believed: its predictions beside the loss that one shortened KV head really costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from moa.errors import UsageError
from moa.eval.scoring import score
from moa.hf.apply import apply
from moa.plan import ModelShape, Plan
from moa.profile.artefact import LengthProfile
from moa.profile.data import TextSample
from moa.spans import DENSE, ElasticRule

FloatArray = npt.NDArray[np.float64]
# Effects within this many standard errors of 0 are noise: another set of texts may well turn their sign.
NOISE_ERRORS = 2.0


@dataclass(frozen=True, eq=False)
class Effects:
    """Change of the answers' loss when one KV head alone gets a span, measured.

    Args:
        spans_tokens: the spans tried, S of them.
        mean: nats per answer token, mean over texts, float64 [L, HKV, S].
        error: its standard error over texts; the dense and the shortened model read the same texts.
    """

    spans_tokens: tuple[int, ...]
    mean: FloatArray
    error: FloatArray

    @property
    def above_noise(self) -> npt.NDArray[np.bool_]:
        """Effects that differ from 0 by more than `NOISE_ERRORS` standard errors, bool [L, HKV, S]."""
        return np.abs(self.mean) > NOISE_ERRORS * self.error


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement of predicted and measured effects, over those above the noise.

    `spearman` is the rank correlation with the size of the effect, `top_quarter` the share of the largest quarter that
    the prediction also puts there.
    """

    spearman: float
    top_quarter: float
    effects: int
    above_noise: int


def text_losses(model: PreTrainedModel, texts: Sequence[TextSample], plan: Plan | None) -> FloatArray:
    """Loss per answer token of each text, float64 [texts], under a plan or dense."""
    with apply(model, plan) if plan else nullcontext():
        return np.array([score(model, t.token_ids, t.answer_positions, t.answer_ids)[1].mean().item() for t in texts])


def measure_effects(
    model: PreTrainedModel,
    shape: ModelShape,
    texts: Sequence[TextSample],
    spans_tokens: Sequence[int],
    sink_tokens: int,
    min_span_tokens: int,
    on_head: Callable[[int, int], None] = lambda done, total: None,
) -> Effects:
    """Give one KV head at a time each span, all others everything, and take the loss.

    Args:
        texts: at least two, with answers.

    Raises:
        UsageError: too few texts for a standard error.
    """
    if len(texts) < 2:
        raise UsageError(f"a standard error needs at least 2 texts, got {len(texts)}")
    dense = text_losses(model, texts, None)
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.kv_heads)]
    changes = np.empty((len(heads), len(spans_tokens), len(texts)))
    for i, head in enumerate(heads):
        for j, span_tokens in enumerate(spans_tokens):
            plan = shortened(shape, [head], ElasticRule(span_tokens, 0.0), sink_tokens, min_span_tokens)
            changes[i, j] = text_losses(model, texts, plan) - dense
        on_head(i + 1, len(heads))
    by_head = (shape.layers, shape.kv_heads, len(spans_tokens))
    error = changes.std(-1, ddof=1) / np.sqrt(len(texts), dtype=np.float64)
    return Effects(tuple(spans_tokens), changes.mean(-1).reshape(by_head), error.reshape(by_head))


def shortened(
    shape: ModelShape, heads: Iterable[tuple[int, int]], rule: ElasticRule, sink_tokens: int, min_span_tokens: int
) -> Plan:
    """A plan that is dense but for some heads (layer, KV head), which get `rule`."""
    some = set(heads)
    rules = [[rule if (i, j) in some else DENSE for j in range(shape.kv_heads)] for i in range(shape.layers)]
    return Plan(
        model=shape,
        sink_tokens=sink_tokens,
        min_span_tokens=min_span_tokens,
        rules=tuple(tuple((rule.alpha, rule.beta) for rule in layer) for layer in rules),
    )


def fidelity(effects: Effects, profile: LengthProfile, min_span_tokens: int) -> Fidelity:
    """Compare a profile's predictions with measured effects of the same spans at the profile's length."""
    rules = [ElasticRule(span_tokens, 0.0) for span_tokens in effects.spans_tokens]
    predicted = np.stack([profile.rule_loss(rule, min_span_tokens, "running") for rule in rules], axis=-1)
    chosen = effects.above_noise
    expected, measured = predicted[chosen], np.abs(effects.mean[chosen])
    count = int(chosen.sum())
    quarter = max(1, count // 4)
    top = set(np.argsort(-expected)[:quarter].tolist()) & set(np.argsort(-measured)[:quarter].tolist())
    rank = float(spearmanr(expected, measured).statistic) if count > 2 else float("nan")
    return Fidelity(rank, len(top) / quarter if count else float("nan"), chosen.size, count)
