"""Gradients through an applied model are those of attention under the plan's mask, in every way transformers trains."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from moa.hf import apply
from moa.plan import Plan


def gradients(model: PreTrainedModel, plan: Plan, backend: str, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """Of the loss after real tokens, for all parameters in a row [P]; row 0 is padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    model.zero_grad()
    with apply(model, plan, backend=backend):
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **options).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradients_are_those_of_the_reference(model, plan, prompts, make, options, checkpointing) -> None:
    model, ids = model.double(), prompts[:, :90]
    plan = make.plan(model)
    want = gradients(model, plan, "reference", ids)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, plan, "torch", ids, **options), want, atol=1e-12, rtol=1e-9)
    dense = make.plan(model, (((0, 1.0),) * 4,) * 2)
    assert not torch.allclose(gradients(model, dense, "torch", ids), want, atol=1e-3)


def test_a_step_of_training_under_a_plan_lowers_its_loss(model, plan, prompts) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    with apply(model, plan):
        losses = []
        for _ in range(3):
            optimiser.zero_grad()
            loss = model.train()(prompts, labels=prompts).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
