"""KV bytes of one sequence, dense and under spans, as the caches hold them: the model's own windows taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from transformers import PreTrainedModel

from moa.errors import ModelError
from moa.eval.paired.records import KvSize
from moa.hf.shape import model_sizes, text_config, unwrapped
from moa.hf.support import check_model, native_windows
from moa.kernels.layout import SpanTable
from moa.plan import ELEMENT_BYTES
from moa.spans import SpanRules


class KvUse(NamedTuple):
    """KV bytes at each length, whether memory is saved where they are fewer than dense ones, and what else to tell."""

    sizes: tuple[KvSize, ...] = ()
    saves_memory: bool = True
    notes: Mapping[str, str] = MappingProxyType({})


def kv_sizes(model: PreTrainedModel, lengths_tokens: Sequence[int], rules: SpanRules | None) -> tuple[KvSize, ...]:
    """KV bytes of one sequence at each length, in the model's dtype.

    Args:
        rules: spans per layer and KV head; None for dense.

    Returns:
        The sizes; () of a model that cannot run under a plan, whose cache may be of another kind.
    """
    core = unwrapped(model)
    try:
        check_model(core)
    except ModelError:
        return ()
    shape = model_sizes(core, str(core.dtype).removeprefix("torch."))
    windows = native_windows(text_config(core))
    token_bytes = 2 * shape.head_dim * ELEMENT_BYTES[shape.dtype]  # keys and values, of one head

    def dense(n_tokens: int) -> int:
        # transformers' cache keeps one token less than a native window: the next query brings its own
        return shape.kv_heads * sum(n_tokens if w is None else min(n_tokens, w - 1) for w in windows)

    def kept(n_tokens: int, table: SpanTable) -> int:
        pinned = rules.pinned_length(n_tokens) if rules and table.is_pinned else None
        return sum(table.live_tokens(int(rule), n_tokens, pinned) for rule in table.rule_of_head.flat)

    table = SpanTable(rules, windows) if rules else None
    return tuple(
        KvSize(
            length_tokens=n,
            kv_bytes=(kept(n, table) if table else dense(n)) * token_bytes,
            dense_kv_bytes=dense(n) * token_bytes,
        )
        for n in lengths_tokens
    )
