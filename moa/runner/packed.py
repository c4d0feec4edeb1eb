"""One forward pass for a whole step: prompts' chunks and decodes of all requests in one row of tokens [1, T].

The model runs as transformers wrote it; its attention function hands queries, keys and values of the row to `attend`,
with the account of which token belongs to whom. Everything else in a decoder looks at one token at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from moa.devices import input_device
from moa.errors import ModelError
from moa.hf.shape import text_config, unwrapped
from moa.hf.support import attention_modules, check_model, native_windows
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend
from moa.kernels.memory import KVMemory
from moa.runner import linears
from moa.spans import BETA_ONE, SpanRules

NAME = "moa-packed"


@dataclass(slots=True)
class _Row:
    """What the attention functions of one model need to know about the row that runs."""

    memory: KVMemory | None = None
    batch: Batch | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """An attention module's layer, its own window, and the row of its model."""

    layer: int
    native_window: int | None
    row: _Row


# Weak, so that a model that is simply dropped leaves nothing behind.
_places: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()


class PackedModel:
    """A model whose attention runs packed until `close()`, or until the `with` block ends; then it is as it was.

    Args:
        model: a transformers causal LM, in eval mode.

    Raises:
        ModelError: it cannot run so, or runs under a plan or in an engine already.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model = unwrapped(model)
        check_free(model)
        modules = attention_modules(model)
        self.model, self.windows = model, native_windows(text_config(model))
        self.device = input_device(model)
        self._row = _Row()
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._undo = ExitStack()
        with ExitStack() as undo:
            self._attach(undo, modules)
            self._undo = undo.pop_all()

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], batch: Batch, memory: KVMemory, wanted: Sequence[int]
    ) -> torch.Tensor:
        """Logits [len(wanted), V], in float32, of a row of tokens; keys that later tokens need are in memory then.

        Args:
            tokens: token ids of the row, [T].
            positions: of each in its sequence, [T].
            batch: which tokens belong to which sequence.
            memory: that holds these sequences.
            wanted: places in the row whose logits are wanted.
        """
        # one copy to the device for all three
        total = linears.padded_tokens(len(tokens), self.device)
        padding = [0] * (total - len(tokens))
        numbers = torch.tensor([*tokens, *padding, *positions, *padding, *wanted]).to(self.device)
        ids, places, keep = torch.split(numbers, [total, total, len(wanted)])
        self._row.memory, self._row.batch = memory, batch
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        try:
            with torch.inference_mode():
                logits: torch.Tensor = self.model(
                    input_ids=ids[None], position_ids=places[None], use_cache=False, **options
                ).logits[0]  # [wanted, V], or [T, V]
                return (logits if self._keeps_logits else logits[keep]).float()
        finally:
            self._row.memory = self._row.batch = None

    def close(self) -> None:
        """Put the model back as it was; repeating it changes nothing."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _attach(self, undo: ExitStack, modules: dict[int, nn.Module]) -> None:
        AttentionInterface.register(NAME, packed_attention)
        for layer, module in modules.items():
            _places[module] = _Place(layer, self.windows[layer], self._row)
            undo.callback(_places.pop, module, None)
        configs = {id(m.config): m.config for m in self.model.modules() if isinstance(m, PreTrainedModel)}
        for config in configs.values():
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        linears.attach(self.model, undo)
        self.model.set_attn_implementation(NAME)
        if text_config(self.model)._attn_implementation != NAME:
            raise ModelError(f"{type(self.model).__name__} did not take the attention implementation {NAME!r}")


def check_free(model: PreTrainedModel) -> None:
    """Make sure that a model could run packed, and does not run under a plan or packed already.

    Raises:
        ModelError: it does, or its attention cannot be replaced.
    """
    check_model(model)
    if "moa" in vars(model) or any(module in _places for module in attention_modules(model).values()):
        raise ModelError("this model runs under a plan or in an engine already; detach the one, or close the other")


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **features: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in a row of several sequences.

    Args:
        module: the layer's attention module.
        query: [1, HQ, T, D].
        key: [1, HKV, T, D].
        value: [1, HKV, T, D].
        attention_mask: None, as for all implementations without a mask function.
        dropout: must be 0.
        scaling: factor on the scores.
        features: `softcap`, `s_aux` (learned sinks) and `sliding_window` of models that have them.

    Returns:
        ([1, T, HQ, D], None).

    Raises:
        ModelError: the module is not part of a packed forward pass, or wants something that is not implemented.
    """
    place = _places.get(module)
    if place is None or place.row.memory is None or place.row.batch is None:
        raise ModelError(f"{type(module).__name__} runs in an engine; close the engine before calling the model itself")
    if attention_mask is not None or dropout:
        raise ModelError(f"layer {place.layer} has a mask of its own or dropout; neither can run packed")
    if features.get("sliding_window", place.native_window) != place.native_window:
        raise ModelError(
            f"layer {place.layer} asks for a sliding window of {features['sliding_window']} tokens, "
            f"its config says {place.native_window}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    out = attend(
        q,
        k,
        v,
        place.row.memory,
        place.layer,
        place.row.batch,
        scale=scaling,
        softcap=features.get("softcap"),
        sinks=features.get("s_aux"),
    )
    return out[None], None


def dense_rules(layers: int, kv_heads: int) -> SpanRules:
    """Rules that keep every token: what no plan means."""
    shape = (layers, kv_heads)
    return SpanRules(
        alpha=np.zeros(shape, dtype=np.int64),
        beta_fixed=np.full(shape, BETA_ONE, dtype=np.int64),
        sink_tokens=0,
        min_span_tokens=1,
    )
