"""One token's attention over keys that it sees all of: views of the cache, no mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moa.kernels.products import has_tile_registers
from moa.kernels.scores import Attended, Scores, scored_attention

# Halves are widened so many numbers at a time, which stay in the cache until they are multiplied.
PIECE_NUMBERS = 1 << 20
# With more query heads per KV head torch's kernel is as fast.
MOST_ROWS = {torch.bfloat16: 1, torch.float16: 8}


def attend_token(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> Attended:
    """Queries [1, Hg, G, D] over keys and values [1, Hg, n, D], all of them seen: [1, Hg, G, D], and [1, Hg, G] if wanted."""
    if scores.wants_lse or not scores.is_plain:
        out, lse = scored_attention(q.permute(1, 2, 0, 3), keys[0], values[0], None, scores)
        return out.permute(2, 0, 1, 3), None if lse is None else lse.permute(2, 0, 1)
    if _is_wide_faster(q):
        return _attend_widened(q[0], keys[0], values[0], scores.scale)[None], None
    return F.scaled_dot_product_attention(q, keys, values, scale=scores.scale), None


def _is_wide_faster(q: torch.Tensor) -> bool:
    """Whether halves are better widened than left to torch's kernel, whose products of few rows are slow without AMX."""
    most = MOST_ROWS.get(q.dtype)
    return most is not None and q.shape[2] <= most and q.device.type == "cpu" and not has_tile_registers()


def _attend_widened(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """The same in float32, piece by piece: [Hg, G, D] in `q`'s dtype."""
    step = max(1, PIECE_NUMBERS // (keys.shape[0] * keys.shape[2]))
    wide = q.float() * scale
    if keys.shape[1] <= step:  # in few calls
        return (torch.softmax(wide @ keys.float().mT, -1) @ values.float()).to(q.dtype)
    parts = [wide @ piece.float().mT for piece in torch.split(keys, step, 1)]
    s = torch.cat(parts, 2)  # [Hg, G, n]
    out = torch.zeros_like(wide)
    for p, piece in zip(torch.split(torch.softmax(s, -1), step, 2), torch.split(values, step, 1), strict=True):
        out.baddbmm_(p, piece.float())
    return out.to(q.dtype)
