"""A trial run: does a model under a dense plan say what it says without one? Seconds, before hours of profiling."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moa.devices import input_device
from moa.errors import ModelError
from moa.hf.apply import apply
from moa.hf.shape import model_shape
from moa.hf.support import check_model
from moa.plan import Plan

TRIAL_TOKENS = 40
# Of the logits' spread. Half precision stays below 0.05; a mask, window or head in the wrong place gives about 1.
LARGEST_DIFFERENCE = 0.2


def check_runs(model: PreTrainedModel) -> None:
    """Make sure that attention under a plan is this model's own attention, by a dense plan on a few random tokens.

    Raises:
        ModelError: the model cannot run under a plan; says why, or by how much its logits differ.
    """
    check_model(model)
    generator = torch.Generator().manual_seed(0)
    known = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # [V, W]; typed as any module
    tokens = torch.randint(known, (1, TRIAL_TOKENS), generator=generator).to(input_device(model))
    dense_plan = Plan.uniform(model_shape(model), 0, 1.0)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits.float()  # [1, T, V]
        with apply(model, dense_plan) as attachment:
            cache = attachment.new_cache()
            cuts = ((0, TRIAL_TOKENS // 2), (TRIAL_TOKENS // 2, TRIAL_TOKENS - 1), (TRIAL_TOKENS - 1, TRIAL_TOKENS))
            steps = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in cuts]
    difference = float((torch.cat(steps, 1).float() - want).abs().mean() / want.std())
    if difference > LARGEST_DIFFERENCE:  # not a number is damaged weights: that is said where losses are taken
        raise ModelError(
            f"{type(model).__name__} cannot run under a plan: under a dense one its logits differ from its own by "
            f"{difference:.2f} of their spread; its attention does something that moa does not know"
        )
