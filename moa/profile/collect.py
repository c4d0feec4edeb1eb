"""Profiling a model: gradients of the answers' loss, along a path towards the sparse model, into a Profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moa.devices import input_device
from moa.errors import DataError, ModelError
from moa.profile import attention
from moa.profile.artefact import LengthProfile
from moa.profile.data import TextSample
from moa.profile.sums import Sums
from moa.profile.sweep import Estimator, SpanGrid, Weighting
from moa.spans import ElasticRule, SpanRules

Objective = Literal["cross_entropy", "margin"]

log = logging.getLogger("moa")


@dataclass(frozen=True, slots=True)
class InfluenceSettings:
    """How influence is estimated.

    Args:
        estimator: what is summed up; see `Estimator`.
        attenuations: the operating points' lambdas; (1.0,) is the dense model.
        reference_density: span of the uniform plan outside of which scores are attenuated, as a share of the length.
        objective: whose gradient is taken: the answers' "cross_entropy", or their "margin", the log-odds of the answer
            against everything else, which does not saturate where the model is sure.
        weighting: every answer "token" counts the same, or every "text".
    """

    estimator: Estimator = "joint"
    attenuations: tuple[float, ...] = (1.0,)
    reference_density: float = 0.125
    objective: Objective = "cross_entropy"
    weighting: Weighting = "token"


def profile_length(
    model: PreTrainedModel,
    samples: Sequence[TextSample],
    n_tokens: int,
    sink_tokens: int,
    min_span_tokens: int,
    settings: InfluenceSettings,
    on_sample: Callable[[int], None] = lambda done: None,
    reference: SpanRules | None = None,
    *,
    checkpointing: bool = False,
    start: Sums | None = None,
    keep: Callable[[Sums], None] = lambda sums: None,
) -> LengthProfile:
    """Influence at one length: the mean over samples and operating points of the size of each sum.

    Args:
        reference: attenuate what these spans leave out, a plan's; by default a uniform plan's of `reference_density`.
        checkpointing: keep layers' inputs alone and compute the rest again, for a third more time.
        start: what an earlier call with the same arguments gave to `keep`; its texts are not profiled again, and the
            result is the same to the last bit.
        keep: takes the sums after each text but the last.

    Raises:
        ModelError: the model's attention cannot be profiled, or its gradients are not finite.
    """
    grid = SpanGrid.for_length(n_tokens, sink_tokens, min_span_tokens)
    reference = reference or uniform(settings.reference_density, sink_tokens, min_span_tokens)
    sums = start
    with profiled(model, checkpointing=checkpointing):
        for done, sample in enumerate(samples[sums.texts if sums else 0 :], sums.texts + 1 if sums else 1):
            for attenuation in settings.attenuations:
                probe = attention.Probe(grid, settings.estimator, attenuation, reference)
                backward(model, sample, probe, settings)
                sums = _added(sums, done, probe, model.config.get_text_config().num_hidden_layers)
            if sums is not None and done < len(samples):
                keep(sums)
            on_sample(done)
    if sums is None:
        raise DataError("there is no text to profile")
    log.info("influence at %d tokens was computed by %s", n_tokens, " and ".join(sums.backends))
    losses = sums.losses / (len(samples) * len(settings.attenuations))
    return LengthProfile(n_tokens, grid, losses, sums.backends)


def _added(sums: Sums | None, texts: int, probe: attention.Probe, n_layers: int) -> Sums:
    """The sums with one more pass, the last or only one over so many texts."""
    if sorted(probe.losses) != list(range(n_layers)):
        silent = sorted(set(range(n_layers)) - set(probe.losses))
        raise ModelError(f"attention of layers {silent} did not report any influence")
    found = torch.stack([probe.losses[layer].abs().cpu() for layer in range(n_layers)]).double().numpy()
    if not np.isfinite(found).all():
        raise ModelError(
            f"the influence at {probe.grid.spans_tokens[-1]} tokens is not finite; the model's weights are damaged, "
            "or its dtype is too narrow for it: try --dtype bfloat16 or float32"
        )
    if sums is None:
        return Sums(texts, tuple(sorted(probe.backends)), found)
    return Sums(texts, tuple(sorted({*sums.backends, *probe.backends})), sums.losses + found)


def backward(model: PreTrainedModel, sample: TextSample, probe: attention.Probe, settings: InfluenceSettings) -> None:
    """One backward pass of the sample's summed or mean answer loss; weights get no gradient, only activations."""
    tokens = torch.tensor([sample.token_ids], device=input_device(model))  # [1, N]
    # a list: an index tensor would have to be on the last layer's device
    before: Any = [position - 1 for position in sample.answer_positions]
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with attention.probing(probe):
        output = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=before)
        logits = output.logits[0].float()  # [answers, V]
        labels = torch.tensor(sample.answer_ids, device=logits.device)
        loss = objective_of(logits, labels, settings.objective)
        torch.autograd.grad(loss.mean() if settings.weighting == "text" else loss.sum(), embedded)


def objective_of(logits: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """What is differentiated, per answer token: logits [answers, V], labels [answers] -> [answers]."""
    if objective == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    # log((1 - p) / p) without the cancellation of 1 - p
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return others - logits.gather(1, labels[:, None])[:, 0]


def uniform(density: float, sink_tokens: int, min_span_tokens: int) -> SpanRules:
    """One span for all heads, a share of the length."""
    rule = ElasticRule(0, density)
    alpha, beta_fixed = np.array([[rule.alpha]]), np.array([[rule.beta_fixed]])
    return SpanRules(alpha, beta_fixed, sink_tokens, min_span_tokens)


@contextmanager
def profiled(model: PreTrainedModel, *, checkpointing: bool = False) -> Iterator[None]:
    """The model with profiling attention and frozen weights; as before afterwards, also after an exception.

    Raises:
        ModelError: `checkpointing` is asked for and the model has no layers that could be computed again.
    """
    attention.register()
    before = model.config._attn_implementation
    wanted_grad = [p for p in model.parameters() if p.requires_grad]
    was_training = [module for module in model.modules() if module.training]
    try:
        model.requires_grad_(False).eval()
        model.set_attn_implementation(attention.NAME)
        with _recomputing(model) if checkpointing else nullcontext():
            yield
    finally:
        model.set_attn_implementation(before)
        for module in was_training:
            module.training = True  # not train(): it would reach submodules that were in eval mode
        for parameter in wanted_grad:
            parameter.requires_grad_(True)


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Layers keep their inputs alone and run again in the backward pass.

    transformers' own switch acts in training mode only, which would turn dropout on.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers to checkpoint; use --no-gradient-checkpointing")
    before = [vars(layer).get("forward") for layer in layers]  # of the instance: accelerate puts its hooks there
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward
