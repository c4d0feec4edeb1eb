"""Random queries, keys and values of a case, in so many sets that no call finds its data in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moa.eval.gpu import work
from moa.eval.gpu.cases import Case, Part

# All sets together are this many times the L2 cache, and at most this share of the device's memory.
CACHES, MEMORY_RATIO, MOST_SETS = 3, 0.25, 64


@dataclass(frozen=True, slots=True)
class PartData:
    """Tensors of equal sequences: queries of the new tokens [S, C, HQ, D], keys and values of all tokens [S, HKV, N, D]."""

    part: Part
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def fresh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the new tokens, each contiguous [S, C, HKV, D]."""
        k, v = (x[:, :, self.part.cached :].transpose(1, 2).contiguous() for x in (self.k, self.v))
        return k, v


@dataclass(frozen=True, slots=True)
class Inputs:
    """One set of buffers, and the layer of the pattern that it stands for."""

    layer: int
    parts: tuple[PartData, ...]

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, HQ, D], keys and values [T, HKV, D] of the new tokens, sequences one after the other."""
        pieces = [(part.q, *part.fresh()) for part in self.parts]
        q, k, v = (torch.cat([piece[i].flatten(0, 1) for piece in pieces]) for i in range(3))
        return q, k, v


def sets_wanted(case: Case, l2_bytes: int, memory_bytes: int) -> int:
    """Sets of buffers for a case: as many as cold caches take, whole rounds of the pattern's layers, within memory."""
    live = int(work.kv_bytes(case).min()) + work.query_bytes(case)
    held = work.dense_kv_bytes(case) + work.query_bytes(case)
    wanted = min(MOST_SETS, -(-CACHES * l2_bytes // live))
    layers = case.pattern.layers
    rounds = max(1, -(-wanted // layers))
    fitting = int(memory_bytes * MEMORY_RATIO) // (held * layers) if memory_bytes else rounds
    return max(1, min(rounds, fitting)) * layers


def make_inputs(case: Case, sets: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Inputs]:
    """Normal random numbers, the same for the same case and device."""
    generator = torch.Generator(device).manual_seed(case.tokens * 1000 + case.batch)
    heads = case.heads

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def draw_part(part: Part) -> PartData:
        s, c, n = part.sequences, part.new, part.cached + part.new
        q = draw(s, c, heads.heads, heads.head_dim)  # [S, C, HQ, D]
        k, v = (draw(s, heads.kv_heads, n, heads.head_dim) for _ in range(2))  # [S, HKV, N, D]
        return PartData(part, q, k, v)

    return [Inputs(i % case.pattern.layers, tuple(map(draw_part, case.parts))) for i in range(sets)]
