"""What a decode step takes at least: weights and KV cache read once, against a device's bandwidth and arithmetic.

    step     = linear + attention
    linear   = max(weight_bytes / bandwidth, 2 * parameters * sequences / flops)
    attention = max(kv_bytes / bandwidth, 4 * G * D * kept_tokens / flops)      over all layers, KV heads and sequences

One device, weights and cache in the model's dtype. Not in it: launches, sampling, the scheduler, communication between
devices, and experts that a step leaves out. A measured step is longer; the model is for comparing budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

from moa.errors import UsageError, closest
from moa.plan import ELEMENT_BYTES, ModelShape

# What kernels reach of the data sheets' peaks. Memory: decode attention on H100 79 to 84 % (FlashMLA's published figures), a
# whole Llama-2-7B decode step on A100 83 % (DuoAttention's), while a plain copy on an H200 reaches 90 % (4.3 of 4.8 TB/s,
# measured with torch 2.11). Arithmetic: 80 % (790 of 989 TFLOP/s, a bf16 product of 8192^3 on an H200, torch 2.11).
MEMORY_RATIO = 0.8
COMPUTE_RATIO = 0.8


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's peaks from its maker's data sheet: memory in bytes/s, dense bfloat16 arithmetic in FLOP/s."""

    memory_bytes_per_s: float
    flops_per_s: float


DEVICES = {
    "a10": Device(0.600e12, 125e12),
    "a100": Device(2.039e12, 312e12),  # SXM, 80 GB
    "b200": Device(8.000e12, 2250e12),
    "h100": Device(3.350e12, 989e12),  # SXM
    "h200": Device(4.800e12, 989e12),
    "l4": Device(0.300e12, 121e12),
    "l40s": Device(0.864e12, 362e12),
}


@dataclass(frozen=True, slots=True)
class Weights:
    """What a decode step reads of a model's weights: all but an input embedding that serves nothing else."""

    parameters: int
    read_bytes: int


def device_named(name: str) -> Device:
    """A known device.

    Raises:
        UsageError: there is none of that name.
    """
    if name.lower() not in DEVICES:
        known = ", ".join(DEVICES)
        raise UsageError(f"--device must be one of {known}, got {name!r}{closest(name.lower(), DEVICES)}")
    return DEVICES[name.lower()]


def linear_s(device: Device, weights: Weights, sequences: int) -> float:
    """Seconds for all matrix products of one step."""
    memory_s = weights.read_bytes / (MEMORY_RATIO * device.memory_bytes_per_s)
    return max(memory_s, 2 * weights.parameters * sequences / (COMPUTE_RATIO * device.flops_per_s))


def attention_s(device: Device, shape: ModelShape, kept_tokens: float) -> float:
    """Seconds for the attention of one step; `kept_tokens` summed over layers, KV heads and sequences."""
    kv_bytes = kept_tokens * 2 * shape.head_dim * ELEMENT_BYTES[shape.dtype]
    flops = kept_tokens * 4 * shape.head_dim * (shape.heads // shape.kv_heads)
    return max(kv_bytes / (MEMORY_RATIO * device.memory_bytes_per_s), flops / (COMPUTE_RATIO * device.flops_per_s))


def basis(name: str, weights: Weights) -> str:
    """The constants of a conversion, in words."""
    device = device_named(name)
    return (
        f"roofline of {name.lower()}: {MEMORY_RATIO:g} of {device.memory_bytes_per_s / 1e12:g} TB/s, "
        f"{COMPUTE_RATIO:g} of {device.flops_per_s / 1e12:g} TFLOP/s (bf16, dense); "
        f"{weights.read_bytes / 1e9:.4g} GB of weights read per step"
    )
