"""Joining partial results of attention: the plain reference of the merge kernel."""

from __future__ import annotations

import torch


def merge_partials(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from that over parts of them.

    Args:
        out: results over each part [splits, ..., D].
        lse: their log-sum-exp in base 2 [splits, ...]; -inf where a part has no key.

    Returns:
        output [..., D], 0 where no part has a key, and log-sum-exp in base 2 [...].
    """
    most = lse.amax(0)  # [...]
    weight = torch.exp2(lse - most.nan_to_num(neginf=0.0))  # [splits, ...]
    total = weight.sum(0)  # [...]
    joined = (out * weight[..., None]).sum(0) / total.where(total > 0, 1)[..., None]
    return joined, most + total.where(total > 0, 1).log2()
