"""How much memory profiling takes, found before it runs: the very same passes on the meta device, where nothing is computed.

The meta device takes the torch sweep's tiles of the CPU, also for a model on CUDA. There the tiles are other ones, or the
Triton kernels have workspace of their own: how far a prediction is off on a GPU was not measured.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moa.devices import compute_devices
from moa.errors import ModelError, ResourceError
from moa.host_memory import free_bytes
from moa.profile import attention, collect
from moa.profile.collect import InfluenceSettings
from moa.profile.data import TextSample
from moa.profile.live_bytes import LiveBytes
from moa.profile.sweep import SpanGrid

# Predictions hold within 10 % (recipes/benchmarks/profile): closer than that to what is free, a run may still fail.
MARGIN = 0.1
ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Footprint:
    """What profiling would take beside the weights, and how."""

    peak_bytes: int
    available_bytes: int
    checkpointing: bool

    @property
    def fits(self) -> bool:
        """Whether it would run for sure."""
        return self.peak_bytes <= (1 - MARGIN) * self.available_bytes

    @property
    def impossible(self) -> bool:
        """Whether it would run out of memory for sure."""
        return self.peak_bytes > (1 + MARGIN) * self.available_bytes

    def require(self, n_tokens: int) -> None:
        """Refuse what cannot run.

        Raises:
            ResourceError: it takes clearly more than is free.
        """
        if self.impossible:
            way_out = "" if self.checkpointing else " --gradient-checkpointing,"
            raise ResourceError(
                f"profiling {n_tokens} tokens needs about {self.peak_bytes >> 20} MiB beside the weights, "
                f"{self.available_bytes >> 20} MiB are free; use{way_out} shorter --lengths or a larger machine"
            )


def fit(
    model: PreTrainedModel, n_tokens: int, spans: tuple[int, int], checkpointing: bool | None, available_bytes: int
) -> Footprint:
    """The footprint of profiling at a length, with checkpointing where it is asked for or, for None, needed.

    Args:
        model: on the meta device; see `meta_twin`.
        n_tokens: the longest profiled length.
        spans: sink and least span in tokens.
        checkpointing: None leaves the choice to what fits.
        available_bytes: what is free.

    Raises:
        ModelError: the model cannot run without values.
    """
    tries = (False, True) if checkpointing is None else (checkpointing,)
    for checkpointed in tries:
        found = Footprint(profile_bytes(model, n_tokens, spans, checkpointed), available_bytes, checkpointed)
        if found.fits:
            break
    return found


def profile_bytes(model: PreTrainedModel, n_tokens: int, spans: tuple[int, int], checkpointing: bool) -> int:
    """Peak bytes of one gradient point beside the weights; raises as `fit`."""
    probe = _probe(n_tokens, spans)
    answers = range(max(1, n_tokens - ANSWER_TOKENS), n_tokens)
    sample = TextSample((0,) * n_tokens, tuple(answers), (0,) * len(answers))
    try:
        with collect.profiled(model, checkpointing=checkpointing), LiveBytes() as live:
            collect.backward(model, sample, probe, InfluenceSettings())
    except (RuntimeError, NotImplementedError) as error:
        raise _no_values(model, error) from None
    peak: int = live.peak
    return peak


def forward_bytes(model: PreTrainedModel, n_tokens: int, spans: tuple[int, int]) -> int:
    """Peak bytes of one forward pass beside the weights; raises as `fit`."""
    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=model.device)
    try:
        with collect.profiled(model), attention.probing(_probe(n_tokens, spans)), torch.no_grad(), LiveBytes() as live:
            model(tokens, use_cache=False, logits_to_keep=ANSWER_TOKENS)
    except (RuntimeError, NotImplementedError) as error:
        raise _no_values(model, error) from None
    peak: int = live.peak
    return peak


def _probe(n_tokens: int, spans: tuple[int, int]) -> attention.Probe:
    settings, grid = InfluenceSettings(), SpanGrid.for_length(n_tokens, *spans)
    reference = collect.uniform(settings.reference_density, *spans)
    return attention.Probe(grid, settings.estimator, settings.attenuations[0], reference)


def _no_values(model: PreTrainedModel, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(f"{type(model).__name__} cannot be measured without running it: {reason[0]}")


def meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model's like without weights.

    Raises:
        ModelError: transformers makes no model of its config, such as of a class of the user's own.
    """
    config = copy.deepcopy(model.config)
    try:
        with torch.device("meta"):
            # False, because without it transformers asks at the terminal whether to run code from a hub
            twin: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a config raises anything, down to ZeroDivisionError
        raise _no_values(model, error) from None
    evaluated: PreTrainedModel = twin.eval()
    return evaluated


def available_bytes(model: PreTrainedModel | None = None) -> int:
    """Bytes that are free now where the model's layers run, all GPUs together; on the CPU without a GPU or a model.

    On the CPU that is this process's share of it; GPUs are not shared. Of a model spread over GPUs this takes for granted that activations spread as the layers do.
    """
    gpus = {device for device in compute_devices(model) if device.type == "cuda"} if model is not None else set()
    if gpus:
        return sum(torch.cuda.mem_get_info(device)[0] for device in gpus)
    return free_bytes()
