"""A plan as a press of NVIDIA's kvpress. Importing this file imports kvpress, which moa itself does not need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor, nn
from transformers import PreTrainedModel

from moa.errors import ModelError, UsageError
from moa.hf.shape import check_plan, text_config, unwrapped
from moa.hf.support import native_windows
from moa.integrations.presses import HIDDEN
from moa.plan import Plan, load_plan


@dataclass
class MoAPress(BasePress):  # type: ignore[misc]  # kvpress has no type information
    """A plan for the answer alone: the prompt is computed densely, then each KV head loses what its span drops.

        with MoAPress("out/plan.json")(model):
            model.model(ids, past_key_values=cache)

    Two things that `moa.apply` does no press can do. Prompts are computed sparsely there; here they are dense. And keys
    that are dropped are freed there; here, as in all presses of kvpress that treat heads differently, they are hidden and
    **no memory is saved**. What later tokens add stays: spans are cut once, after the prompt.

    Args:
        plan: the plan, or where `load_plan` finds it.
        allow_other_weights: accept a plan made for other weights of the same shape.

    Raises:
        PlanError, HubError: there is no such plan; when attached: it is for another model.
        ModelError: when attached: the model has sliding windows of its own.
        UsageError: attention is eager, which kvpress cannot hide keys from.
    """

    plan: Plan | str
    allow_other_weights: bool = False
    _plan: Plan = field(init=False, repr=False)
    _pressed_tokens: int | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self._plan = self.plan if isinstance(self.plan, Plan) else load_plan(self.plan)

    @property
    def compression_ratio(self) -> float:
        """Share of keys that is hidden: of the last prompt, or before any, of the plan's longest length.

        Raises:
            UsageError: there was no prompt, and the plan names no length.
        """
        lengths = [self._pressed_tokens] if self._pressed_tokens else [at.length_tokens for at in self._plan.lengths]
        if not lengths:
            raise UsageError("the plan names no length; its compression ratio is known once a prompt was pressed")
        return 1 - self._plan.span_rules.density_ratio(max(lengths))

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        raise AttributeError(f"compression ratio cannot be set for {type(self).__name__}: the plan decides it")

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Make sure that the plan fits the model; see the class for what it raises."""
        check_plan(model, self._plan, allow_other_weights=self.allow_other_weights)
        if any(native_windows(text_config(unwrapped(model)))):
            raise ModelError(f"{type(model).__name__} has sliding windows, whose caches presses cannot compress")

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """kvpress' hook, for any transformers: a prompt is what fills an empty cache, whatever `cache_position` says."""
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if layer.keys.shape[2] == kwargs["hidden_states"].shape[1]:
            self.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
        return output

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Hide the keys [B, HKV, n, D] of a prompt that no span keeps; keys and values come back whole."""
        if module.config._attn_implementation == "eager":  # type: ignore[union-attr]
            raise UsageError("kvpress cannot hide keys from eager attention; load the model with sdpa")
        n_tokens = self._pressed_tokens = keys.shape[2]
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        starts = self._plan.span_rules.window_start(n_tokens - 1, n_tokens)[layer]  # [HKV]
        window = torch.as_tensor(starts, device=keys.device)[:, None]  # [HKV, 1]
        position = torch.arange(n_tokens, device=keys.device)
        dropped = (position >= self._plan.sink_tokens) & (position < window)  # [HKV, n]
        hidden = torch.nonzero(dropped.expand(keys.shape[:3]), as_tuple=True)
        setattr(module, HIDDEN, hidden)
        return keys, values
