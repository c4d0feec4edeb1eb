"""Linear layers of a packed row by oneDNN where that is faster: in float32 torch multiplies by MKL on every x86 processor.

Measured on AMD EPYC (AVX-512), 2 threads: 1.4 to 2.5 x from 2**21 multiplications on, 0.2 to 1 x below, where a call costs
20 us instead of 5; matrices that no cache holds gain with one token already.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from moa.kernels.products import has_onednn

LEAST_MULTIPLICATIONS, LEAST_WEIGHTS = 1 << 21, 1 << 19
# Rows of fewer tokens are run as they are: oneDNN compiles a product per shape, and these are few.
LEAST_PADDED = 32


def attach(model: nn.Module, undo: ExitStack) -> None:
    """Let a model's plain float32 linear layers on a CPU multiply by oneDNN until `undo`; on other machines nothing changes."""
    if not has_onednn():
        return
    for module in model.modules():
        # neither subclasses, which have ways of their own, nor modules whose forward somebody has replaced
        if type(module) is nn.Linear and "forward" not in vars(module) and _is_plain(module.weight):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
            undo.callback(delattr, module, "forward")


def padded_tokens(tokens: int, device: torch.device) -> int:
    """Tokens that a row of so many is filled up to, at most a sixteenth more, so that few shapes are compiled."""
    if device.type != "cpu" or not has_onednn() or tokens <= LEAST_PADDED:
        return tokens
    step = (1 << (tokens - 1).bit_length() - 1) // 16
    return -(-tokens // step) * step


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`nn.Linear.forward`, x [..., in_features] -> [..., out_features]."""
    weight, numbers = module.weight, module.weight.numel()
    rows = x.numel() // module.in_features
    if (
        (numbers < LEAST_WEIGHTS and rows * numbers < LEAST_MULTIPLICATIONS)
        or rows == 0
        or x.dtype != weight.dtype
        or not _is_plain(weight)
        or torch.is_grad_enabled()
    ):
        return F.linear(x, weight, module.bias)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, module.bias, "none", [], "")
    return out
