"""Matrix products by oneDNN, which torch's CPU attention does not use: with AVX-512 on AMD 2.3 x as fast as MKL in float32."""

from __future__ import annotations

import platform
from functools import cache

import torch

# oneDNN compiles a product for every shape it meets, in about a millisecond; lengths rounded up so are few.
LENGTH_STEP, STEPS_PER_OCTAVE = 64, 16


@cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN's matrix products, and the processor is one they were measured on."""
    known = platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return bool(known and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # which asks for AVX-512, too


@cache
def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@cache
def has_tile_registers() -> bool:
    """Whether the processor has AMX, with which torch's fused attention multiplies halves faster than this does float32."""
    return bool(torch.cpu._is_amx_tile_supported())


def rounded_length(length: int) -> int:
    """The least of few lengths that holds `length`, at most a sixteenth more above 1,024."""
    step = max(LENGTH_STEP, (1 << (length - 1).bit_length() - 1) // STEPS_PER_OCTAVE) if length > 1 else LENGTH_STEP
    return -(-length // step) * step


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T` by oneDNN, of float32 or bfloat16 matrices [m, d] and [n, d] without gradient and none of them empty: [m, n].

    Memory must be dense, in `b` in either order: oneDNN walks strided matrices with plain loops, 200 x slower.
    """
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out
