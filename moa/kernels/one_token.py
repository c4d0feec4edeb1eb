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
    """Queries [Hg, G, D] over keys and values [Hg, n, D], all of them seen: [Hg, G, D], and [Hg, G] if wanted."""
    if scores.wants_lse or not scores.is_plain:
        out, lse = scored_attention(q[:, :, None], keys, values, None, scores)
        return out[:, :, 0], None if lse is None else lse[:, :, 0]
    if _is_wide_faster(q):
        return _attend_widened(q, keys, values, scores.scale), None
    out = F.scaled_dot_product_attention(
        q.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), scale=scores.scale
    )  # [1, Hg, G, D]
    return out.squeeze(0), None


def _is_wide_faster(q: torch.Tensor) -> bool:
    """Whether halves are better widened than left to torch's kernel, whose products of few rows are slow without AMX."""
    return q.device.type == "cpu" and q.shape[1] <= MOST_ROWS.get(q.dtype, 0) and not has_tile_registers()


def _attend_widened(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """The same in float32, piece by piece: [Hg, G, D] in `q`'s dtype."""
    step = max(1, PIECE_NUMBERS // (keys.shape[0] * keys.shape[2]))
    wide = q.float() * scale
    parts = [wide @ piece.float().mT for piece in torch.split(keys, step, 1)]
    s = parts[0] if len(parts) == 1 else torch.cat(parts, 2)  # [Hg, G, n]
    out = torch.zeros_like(wide)
    for p, piece in zip(torch.split(torch.softmax(s, -1), step, 2), torch.split(values, step, 1), strict=True):
        out.baddbmm_(p, piece.float())
    return out.to(q.dtype)
