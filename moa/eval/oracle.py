"""The best plan that measuring alone can find: spans are shortened one by one, each time where the true loss grows least.

Slow, and there for comparison: it needs hundreds of evaluations of the model for what a profile predicts from a few.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from moa.errors import InfeasibleError
from moa.eval.fidelity import text_losses
from moa.plan import ModelShape, Plan
from moa.profile.data import TextSample

Spans = list[list[int]]
# A cost measured before other heads were shortened is trusted to order the queue, never to decide.
TRIED_PER_STEP = 3


def oracle_plans(
    model: PreTrainedModel,
    shape: ModelShape,
    texts: Sequence[TextSample],
    n_tokens: int,
    densities: Sequence[float],
    sink_tokens: int,
    min_span_tokens: int,
    on_density: Callable[[float], None] = lambda density: None,
) -> dict[float, Plan]:
    """Greedy plans of fixed spans for one length, by measured loss; lazily, as in accelerated greedy (Minoux 1978).

    Every head starts dense. A step shortens one head to half its span, or at once to the least: the change of least loss
    per token saved among the most promising, each measured again where others were made since. A density's plan is the
    first that keeps it.

    Args:
        texts: with answers, of about `n_tokens`.
        densities: mean span/n_tokens over heads, any order.

    Raises:
        InfeasibleError: the least span alone exceeds a density.
    """
    if min_span_tokens > min(densities) * n_tokens:
        raise InfeasibleError(
            f"no plan has density {min(densities):g} at {n_tokens} tokens with spans of at least {min_span_tokens}"
        )
    search = _Search(model, shape, texts, n_tokens, sink_tokens, min_span_tokens)
    plans = {}
    for density in sorted(densities, reverse=True):
        while search.used_tokens > density * n_tokens * shape.layers * shape.kv_heads:
            search.step()
        plans[density] = search.plan(search.spans)
        on_density(density)
    return plans


@dataclass(frozen=True, order=True, slots=True)
class _Change:
    """A head's next span, its cost in loss per token saved, and the loss then; measured at some step."""

    cost: float
    layer: int
    head: int
    span_tokens: int
    loss: float
    measured_at: int


class _Search:
    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelShape,
        texts: Sequence[TextSample],
        n_tokens: int,
        sink_tokens: int,
        min_span_tokens: int,
    ) -> None:
        self._model, self._shape, self._texts = model, shape, texts
        self._n, self._sink, self._least = n_tokens, sink_tokens, min_span_tokens
        self.spans: Spans = [[n_tokens] * shape.kv_heads for _ in range(shape.layers)]
        self._loss = self._measure(self.spans)
        self._steps = 0
        self._queue: list[_Change] = []
        for layer in range(shape.layers):
            for head in range(shape.kv_heads):
                self._push(layer, head)

    @property
    def used_tokens(self) -> int:
        return sum(map(sum, self.spans))

    def step(self) -> None:
        """Shorten one head, for the least measured loss per token saved."""
        tried: list[_Change] = []
        while self._queue and len(tried) < TRIED_PER_STEP:
            change = heapq.heappop(self._queue)
            if change.span_tokens < self.spans[change.layer][change.head]:
                fresh = change.measured_at == self._steps
                tried.append(change if fresh else self._measured(change.layer, change.head, change.span_tokens))
        best = min(tried)
        for other in tried:
            if other is not best:
                heapq.heappush(self._queue, other)
        self.spans[best.layer][best.head] = best.span_tokens
        self._loss = best.loss
        self._steps += 1
        self._push(best.layer, best.head)

    def _push(self, layer: int, head: int) -> None:
        """Measure what a head may be shortened to next."""
        now = self.spans[layer][head]
        for span_tokens in sorted({max(self._least, now // 2), self._least} - {now}):
            heapq.heappush(self._queue, self._measured(layer, head, span_tokens))

    def _measured(self, layer: int, head: int, span_tokens: int) -> _Change:
        spans = [list(heads) for heads in self.spans]
        spans[layer][head] = span_tokens
        loss = self._measure(spans)
        saved = self.spans[layer][head] - span_tokens
        return _Change((loss - self._loss) / saved, layer, head, span_tokens, loss, self._steps)

    def _measure(self, spans: Spans) -> float:
        return float(text_losses(self._model, self._texts, self.plan(spans)).mean())

    def plan(self, spans: Spans) -> Plan:
        """Spans as a plan; a head that keeps all `n_tokens` is dense at any length."""
        rules = tuple(tuple((0, 1.0) if s >= self._n else (s, 0.0) for s in layer) for layer in spans)
        return Plan(model=self._shape, sink_tokens=self._sink, min_span_tokens=self._least, rules=rules)
