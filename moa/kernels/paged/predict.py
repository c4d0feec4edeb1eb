"""Whether prefill tiles and decodes are launched together: only where a model of both predicts a gain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moa.kernels.paged.pool import Int32Array
from moa.kernels.paged.splits import UNIT_TOKENS, HeadRules, Step, count_units

# Least ideal gain: about half of it is what fused launches reach (POD-Attention), and smaller tiles cost the rest.
LEAST_IDEAL_GAIN = 1.15


@dataclass(frozen=True, slots=True)
class Rates:
    """What a GPU reaches: prefill in FLOP/s, decode in bytes/s."""

    prefill: float
    decode: float


# bfloat16, head_dim 128; assumed from what kernels of this kind are published to reach, none of it measured with ours: 45 %
# of the data sheet's dense bfloat16 peak, and 86 % of a measured copy (H200) or 78 % of the data sheet's bandwidth.
RATES = {
    "NVIDIA H200": Rates(450e12, 3.7e12),
    "NVIDIA H100": Rates(450e12, 2.6e12),
    "NVIDIA A100": Rates(140e12, 1.6e12),
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of both parts over all layers, each alone: the prefill tiles, and the decodes."""

    prefill_s: float
    decode_s: float

    @property
    def ideal_gain(self) -> float:
        """(T_prefill + T_decode) / max of both: what perfect overlap would gain."""
        return (self.prefill_s + self.decode_s) / max(self.prefill_s, self.decode_s, 1e-12)

    @property
    def pays(self) -> bool:
        """Whether one launch is predicted to win over two."""
        return self.ideal_gain > LEAST_IDEAL_GAIN

    @property
    def reason(self) -> str:
        """Why, in a few words."""
        return f"ideal gain {self.ideal_gain:.2f}, wanted more than {LEAST_IDEAL_GAIN}"


def rates_of(device_name: str) -> Rates | None:
    """Rates of a GPU by the beginning of its name; None if it is not known."""
    return next((rates for name, rates in RATES.items() if device_name.startswith(name)), None)


def predict(
    step: Step,
    prefill: tuple[Int32Array, int],
    decode: tuple[Int32Array, int],
    heads: HeadRules,
    sizes: tuple[int, int],
    rates: Rates,
) -> Prediction:
    """What both parts of a step take.

    Args:
        step: the slices.
        prefill: tiles (slice, first row) [M, 2], and rows of a tile.
        decode: the same of the decodes.
        heads: rules of the KV heads.
        sizes: head_dim, and bytes that a stored key or value element takes.
        rates: of the GPU.
    """
    head_dim, element_bytes = sizes
    share = np.bincount(heads.rule_of_head.reshape(-1), minlength=len(heads.rules))  # [R]
    tiles, decodes = (int((count_units(step, *part, heads) @ share).sum()) for part in (prefill, decode))
    prefill_s = 4 * head_dim * prefill[1] * UNIT_TOKENS * tiles / rates.prefill
    decode_s = 2 * head_dim * element_bytes * UNIT_TOKENS * decodes / rates.decode
    return Prediction(prefill_s, decode_s)
