"""Next-token scores at chosen positions of a text; the one place where an evaluation calls the model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moa.devices import input_device
from moa.errors import DataError, ModelError
from moa.profile.data import TextSample


@torch.no_grad()
def score(
    model: PreTrainedModel, token_ids: Sequence[int], positions: Sequence[int], wanted_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The model's first choices for, and its negative log-likelihood of, the tokens at `positions`, given all before.

    One forward call without a cache; logits are made for these positions alone, never [N, V].

    Args:
        model: a transformers causal LM, dense or with a plan applied.
        token_ids: a text of N tokens.
        positions: K places in it, each at least 1.
        wanted_ids: the K tokens whose likelihood is asked for; those of the text when None.

    Returns:
        choices int64 [K] and negative log-likelihoods in nats, float32 [K], both on the CPU.

    Raises:
        DataError: a position has no token before it.
        ModelError: the model cannot leave out logits.
    """
    if not positions or min(positions) < 1 or max(positions) >= len(token_ids):
        raise DataError(f"positions to score must lie in [1, {len(token_ids)}), got {list(positions)[:5]}")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__}.forward takes no logits_to_keep; use a causal LM of transformers 5")
    tokens = torch.tensor([token_ids], device=input_device(model))  # [1, N]
    before = [position - 1 for position in positions]  # a list: a tensor would have to be on the last layer's device
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=before).logits[0].float()  # [K, V]
    wanted_ids = [token_ids[p] for p in positions] if wanted_ids is None else wanted_ids
    wanted = torch.tensor(wanted_ids, device=logits.device)  # [K]
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")  # [K]
    return logits.argmax(-1).cpu(), losses.cpu()


def answer_loss(model: PreTrainedModel, samples: Sequence[TextSample]) -> float:
    """Mean negative log-likelihood in nats per answer token of all samples, one forward call each.

    Raises:
        DataError: there is no answer token at all.
        ModelError: as `score`.
    """
    answered = [s for s in samples if s.answer_positions]
    if not answered:
        raise DataError(f"none of the {len(samples)} texts has an answer whose loss could be taken")
    losses = [score(model, s.token_ids, s.answer_positions, s.answer_ids)[1] for s in answered]
    return float(torch.cat(losses).double().mean())
