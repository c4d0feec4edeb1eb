"""Codes of keys and values with a scale per token: the plain reference of what the append kernel writes."""

from __future__ import annotations

import torch

LEAST_SCALE = 1e-30


def most_code(dtype: torch.dtype) -> float:
    """The largest code of a dtype: 127 of int8, 448 of E4M3."""
    return 127.0 if dtype == torch.int8 else float(torch.finfo(dtype).max)


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., D] in `dtype` and scales float32 [...] of numbers x [..., D]; a row's largest number has the largest code."""
    most = most_code(dtype)
    scale = (x.float().abs().amax(-1) / most).clamp_min(LEAST_SCALE)  # [...]
    codes = x.float() / scale[..., None]
    return (codes.round().clamp(-most, most) if dtype == torch.int8 else codes).to(dtype), scale


def dequantise(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Numbers float32 [..., D] from codes [..., D] and scales [...]."""
    return codes.float() * scale[..., None]
