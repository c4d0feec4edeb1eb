"""How much KV memory an engine has, and in what units it is counted."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moa.devices import input_device
from moa.errors import ResourceError
from moa.hf.shape import model_sizes, text_config
from moa.hf.support import check_model, native_windows
from moa.host_memory import free_bytes
from moa.kernels.dispatch import new_memory
from moa.kernels.paged.pool import PAGE_TOKENS
from moa.plan import Plan
from moa.runner.account import Footprint, KVAccount
from moa.runner.host import MemoryHost
from moa.runner.packed import dense_rules
from moa.runner.settings import EngineSettings

# Rows of tokens have spare slots at their ends, 1.5 % of them (moa.kernels.store).
ROWS_SHARE = 0.97
# Of free memory, for an engine that is not told how much it may take; the rest is for its steps and everybody else.
FREE_SHARE = 0.5


def new_host(model: PreTrainedModel, plan: Plan | None, settings: EngineSettings) -> MemoryHost:
    """Empty KV memory for an engine, and the account of it.

    Raises:
        ModelError: the model has no shape that a plan could have.
        UsageError: there is no such backend, or it cannot run here.
        ResourceError: there is too little memory for a single token.
    """
    check_model(model)
    windows = native_windows(text_config(model))
    sizes = model_sizes(model, str(model.dtype).removeprefix("torch."))
    rules = dense_rules(sizes.layers, sizes.kv_heads) if plan is None else plan.span_rules
    page_tokens = PAGE_TOKENS if settings.backend == "triton" else 1
    slot_bytes = page_tokens * 2 * sizes.head_dim * model.dtype.itemsize
    total_bytes = _free(input_device(model)) * FREE_SHARE if settings.kv_bytes is None else settings.kv_bytes
    total = int(total_bytes * (1 if page_tokens > 1 else ROWS_SHARE)) // slot_bytes
    footprint = Footprint(rules, windows, page_tokens)
    if total < footprint.heads:
        raise ResourceError(
            f"{int(total_bytes)} bytes of KV memory hold no token: one takes {slot_bytes * footprint.heads} in "
            f"{footprint.heads} KV heads; give kv_bytes more"
        )
    pages = total if page_tokens > 1 else None
    memory = new_memory(settings.backend, rules, windows, kv_dtype=settings.kv_dtype, pages=pages)
    cache_slots = int(total * settings.prefix_cache_ratio)
    digest = plan.sha256 if plan is not None else "dense"
    return MemoryHost(memory, KVAccount(footprint, total), digest, settings.prefix_block_tokens, cache_slots)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
