"""Everything that is measured, ours first: what comes first is measured first."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend

from moa.errors import UsageError
from moa.eval.gpu.peer_flash import FlashAttention
from moa.eval.gpu.peer_flashinfer import FlashInfer
from moa.eval.gpu.peer_flex import Flex
from moa.eval.gpu.peer_sdpa import Sdpa
from moa.eval.gpu.subject import Subject
from moa.eval.gpu.whole_step import WholeStep


def all_subjects(device: torch.device) -> list[Subject]:
    """Our kernels and every peer, installed or not; raises UsageError where there is no triton."""
    if find_spec("triton") is None:
        raise UsageError("triton is not installed, and the kernels are written in it; install it with torch for CUDA")
    from moa.eval.gpu.own import Kernels, Planner  # imports triton, as the next
    from moa.eval.gpu.own_mixed import Mixed

    return [Kernels(), Mixed("serial"), Mixed("tickets"), Planner(), WholeStep("triton"), *peers(device)]


def peers(device: torch.device) -> list[Subject]:
    """Other people's kernels."""
    return [
        Sdpa("SDPA flash", SDPBackend.FLASH_ATTENTION, device),
        Sdpa("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, device),
        FlashAttention("flash_attn_interface"),
        FlashAttention("flash_attn"),
        FlashAttention("flash_attn_interface", "equal length"),
        FlashAttention("flash_attn", "equal length"),
        Flex(device),
        FlashInfer(device),
        FlashInfer(device, "equal length"),
    ]
