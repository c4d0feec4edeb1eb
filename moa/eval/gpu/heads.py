"""The attention shapes of the models that the kernels are measured for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Query heads, KV heads and head_dim of one layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


# from the models' config.json
LLAMA_8B = HeadShape("Llama-3-8B", 32, 8, 128)
LLAMA_70B = HeadShape("Llama-3-70B", 64, 8, 128)
QWEN_7B = HeadShape("Qwen2.5-7B", 28, 4, 128)
HEADS = (LLAMA_8B, LLAMA_70B, QWEN_7B)
