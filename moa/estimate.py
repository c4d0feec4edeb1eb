"""What compressing a model would take, from its config alone: weights, KV bytes, peak memory and time.

Nothing is computed: the model's passes run on the meta device, where only sizes count. Time comes from timing the
profiler's own sweep of one KV head on this machine, in the model's attention shape, and one matrix product in its layer
shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moa.errors import ModelError
from moa.hf.size import model_without_weights
from moa.pipeline import check_lengths
from moa.plan import ELEMENT_BYTES
from moa.profile import footprint, torch_sweep
from moa.profile.sweep import Scores, SpanGrid
from moa.settings import CompressSettings

MEASURE_S = 0.3
SWEEP_TOKENS = 2048
PRODUCT_ROWS = 4096  # enough that starting the threads does not count


@dataclass(frozen=True, slots=True)
class LengthEstimate:
    """What one length takes: seconds for all its texts, bytes at the peak, KV bytes of one sequence."""

    length_tokens: int
    time_s: float
    peak_bytes: int
    dense_kv_bytes: int
    plan_kv_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `compress` would take."""

    architecture: str
    parameters: int
    dtype: str
    weight_bytes: int
    density: float
    lengths: tuple[LengthEstimate, ...]
    time_s: float
    peak_bytes: int
    available_bytes: int
    gradient_checkpointing: bool
    memory_by: Literal["simulation", "rule of thumb"]

    @property
    def warning(self) -> str:
        """What would go wrong, or nothing."""
        if self.peak_bytes <= (1 - footprint.MARGIN) * self.available_bytes:
            return ""
        return (
            f"this needs about {self.peak_bytes >> 20} MiB and {self.available_bytes >> 20} MiB are free; "
            "use shorter --lengths or a larger machine"
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "warning": self.warning}


def estimate_compress(name: str, settings: CompressSettings, dtype: str = "auto") -> Estimate:
    """Estimate a `compress` run on this machine's CPU.

    Args:
        name: folder or hub id.
        settings: of the run.
        dtype: of the weights; "auto" for the checkpoint's own.

    Raises:
        ModelError: there is no such model, or its config has no known shape.
        UsageError: the lengths exceed the model's context, or there is no such dtype.
    """
    model = _meta_model(name, dtype)
    check_lengths(model, settings)
    config, text = model.config, model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    if dtype not in ELEMENT_BYTES:
        raise ModelError(f"{name}: its dtype is {dtype}, wanted one of {', '.join(ELEMENT_BYTES)}")
    element = ELEMENT_BYTES[dtype]
    rates, available = _measure(text, settings), footprint.available_bytes()
    peaks, checkpointing, memory_by = _peaks(model, settings, available - parameters * element, element)
    lengths = []
    for n in (*settings.lengths_tokens, settings.unseen_tokens):
        profiled = n in settings.lengths_tokens
        kv = _kv_elements(text) * n * element
        lengths.append(
            LengthEstimate(
                length_tokens=n,
                time_s=_profile_s(rates, text, parameters, n, settings, checkpointing)
                if profiled
                else _validate_s(rates, text, parameters, n, settings),
                peak_bytes=parameters * element + peaks[n],
                dense_kv_bytes=kv,
                plan_kv_bytes=int(kv * settings.density),
            )
        )
    return Estimate(
        architecture=type(model).__name__,
        parameters=parameters,
        dtype=dtype,
        weight_bytes=parameters * element,
        density=settings.density,
        lengths=tuple(lengths),
        time_s=sum(at.time_s for at in lengths),
        peak_bytes=max(at.peak_bytes for at in lengths),
        available_bytes=available,
        gradient_checkpointing=checkpointing,
        memory_by=memory_by,
    )


def _peaks(
    model: PreTrainedModel, settings: CompressSettings, free_bytes: int, element: int
) -> tuple[dict[int, int], bool, Literal["simulation", "rule of thumb"]]:
    """Peak bytes beside the weights at each length, whether with checkpointing, and how that was found."""
    unseen, longest = settings.unseen_tokens, settings.lengths_tokens[-1]
    wanted = settings.gradient_checkpointing
    try:
        fitted = footprint.fit(model, longest, settings.spans, wanted, free_bytes)
        peaks = {
            n: footprint.profile_bytes(model, n, settings.spans, fitted.checkpointing)
            for n in settings.lengths_tokens[:-1]
        }
        peaks[longest], peaks[unseen] = fitted.peak_bytes, footprint.forward_bytes(model, unseen, settings.spans)
    except ModelError:  # such as experts chosen by value, in a dtype whose kernel has no meta form
        text = model.config.get_text_config()
        lengths = (*settings.lengths_tokens, unseen)
        rule = {n: _activation_bytes(text, n, element, backward=n != unseen) for n in lengths}
        return rule, bool(wanted), "rule of thumb"
    return peaks, fitted.checkpointing, "simulation"


def _meta_model(name: str, dtype: str) -> PreTrainedModel:
    """The model without its weights."""
    model = model_without_weights(name, dtype)
    if min(_counts(model.config.get_text_config())) < 1:
        raise ModelError(f"{name}: its config must have at least one layer, head and dimension")
    return model


def _counts(text: PreTrainedConfig) -> tuple[int, ...]:
    return text.num_hidden_layers, text.num_attention_heads, _head_dim(text), text.hidden_size


def _inner(text: PreTrainedConfig) -> int:
    """Width of the MLP; four times the model's where a config has another name for it."""
    return int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)


def _head_dim(text: PreTrainedConfig) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _kv_elements(text: PreTrainedConfig) -> int:
    """Elements of keys and values per token."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * _head_dim(text))


@dataclass(frozen=True, slots=True)
class _Rates:
    matmul_flops_per_s: float
    sweep_s_per_score: float


def _measure(text: PreTrainedConfig, settings: CompressSettings) -> _Rates:
    """Time one layer-shaped matrix product and a short sweep of one KV head."""
    # capped: rates need no more, and a config can claim any size
    width, inner = min(2048, text.hidden_size), min(8192, _inner(text))
    group = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    d, n = min(512, _head_dim(text)), min(SWEEP_TOKENS, settings.lengths_tokens[-1])
    a, b = torch.randn(PRODUCT_ROWS, width), torch.randn(width, inner)
    matmul_s = _best_s(lambda: a @ b)
    q, k = torch.randn(1, min(16, group), n, d), torch.randn(1, 1, n, d)  # one KV head
    scores, grid = Scores(d**-0.5), SpanGrid.for_length(n, *settings.spans)

    def sweep() -> None:
        out, lse = torch_sweep.forward(q, k, k, None, scores)
        torch_sweep.backward(q, k, k, None, out, lse, out, scores, grid, settings.estimator)

    return _Rates(2 * PRODUCT_ROWS * width * inner / matmul_s, _best_s(sweep) / (q.shape[1] * n * n / 2))


def _best_s(work: Callable[[], object]) -> float:
    """The fastest of at least three runs, and of as many as fit in `MEASURE_S`: the machine may be busy."""
    times: list[float] = []
    left = MEASURE_S
    while len(times) < 3 or left > 0:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
        left -= times[-1]
    return min(times)


def _profile_s(
    rates: _Rates, text: PreTrainedConfig, parameters: int, n: int, settings: CompressSettings, checkpointing: bool
) -> float:
    """Forward, and backward into activations only: two passes over the weights; and every causal tile once.

    Checkpointing does the forward part again: one more pass, and 2 of the 7 matrix products of a tile.
    """
    weights_s = (6 if checkpointing else 4) * parameters * n / rates.matmul_flops_per_s
    scores = text.num_hidden_layers * text.num_attention_heads * n * n / 2 * (9 / 7 if checkpointing else 1)
    return float(settings.rounds * settings.num_samples * (weights_s + scores * rates.sweep_s_per_score))


def _validate_s(rates: _Rates, text: PreTrainedConfig, parameters: int, n: int, settings: CompressSettings) -> float:
    """One forward pass per text and candidate, plus one for the dense model."""
    flops = 2 * parameters * n + 2 * text.num_hidden_layers * text.num_attention_heads * _head_dim(text) * n * n
    return float((settings.max_candidates + 1) * max(2, settings.num_samples // 2) * flops / rates.matmul_flops_per_s)


def _activation_bytes(text: PreTrainedConfig, n: int, element: int, *, backward: bool) -> int:
    """What backward keeps per layer (inputs of norms, projections' outputs, the MLP's products).

    A forward pass alone holds one layer's at a time.
    """
    heads = text.num_attention_heads * _head_dim(text)
    kv = _kv_elements(text) // text.num_hidden_layers
    per_token = 8 * text.hidden_size + 4 * heads + 3 * kv + 4 * _inner(text)
    if not backward:
        return int(per_token * n * element)
    return int(text.num_hidden_layers * per_token * n * max(4, element))
