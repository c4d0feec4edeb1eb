"""What a profile has added up so far, as bytes: a killed run goes on from it to the very same numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sums:
    """Influence at one length, summed over the first texts and all operating points.

    Args:
        texts: how many.
        backends: who computed it, sorted.
        losses: float64 [L, HKV, positions, spans].
    """

    texts: int
    backends: tuple[str, ...]
    losses: FloatArray

    def to_bytes(self) -> bytes:
        """One safetensors file."""
        metadata = {"texts": str(self.texts), "backends": json.dumps(self.backends)}
        return safetensors.numpy.save({"losses": np.ascontiguousarray(self.losses)}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Sums:
        """What `to_bytes` gave.

        Raises:
            ValueError: it did not.
        """
        try:
            losses = safetensors.numpy.load(data)["losses"]
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            found = cls(int(header["texts"]), tuple(map(str, json.loads(header["backends"]))), losses)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"no sums: {error}") from None
        if losses.dtype != np.float64 or losses.ndim != 4 or found.texts < 1 or not np.isfinite(losses).all():
            raise ValueError(f"sums over {found.texts} texts, {losses.dtype} {losses.shape}")
        return found
