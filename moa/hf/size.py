"""How large a model is, from its config alone: its shape, and what a decode step reads of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moa.errors import ModelError
from moa.hf.load import check_dtype, first_line, load_config
from moa.hf.shape import model_sizes
from moa.plan import ELEMENT_BYTES, ModelShape


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model's shape (without a fingerprint), and its weights but for an input embedding that serves nothing else."""

    shape: ModelShape
    parameters: int
    weight_bytes: int


def model_size(name: str, dtype: str = "auto") -> ModelSize:
    """The size of a model in a folder or on the hub; loads no weights.

    Args:
        name: folder or hub id.
        dtype: of weights and cache; "auto" for the checkpoint's own.

    Raises:
        ModelError: there is no such model, or its config makes no causal language model.
    """
    model = model_without_weights(name)
    if dtype == "auto":
        dtype = str(model.config.dtype or torch.float32).removeprefix("torch.")
    shape = model_sizes(model, dtype)
    read = sum(p.numel() for p in model.parameters())
    if not model.config.get_text_config().tie_word_embeddings:
        read -= model.get_input_embeddings().weight.numel()  # type: ignore[operator]  # typed as any module
    return ModelSize(shape, read, read * ELEMENT_BYTES[dtype])


def model_without_weights(name: str, dtype: str = "auto") -> PreTrainedModel:
    """A model on the meta device: all sizes, no memory.

    Args:
        name: folder or hub id.
        dtype: of the weights; "auto" for the checkpoint's own.

    Raises:
        UsageError: there is no such dtype.
        ModelError: there is no such model, or its config makes no causal language model.
    """
    check_dtype(dtype)
    config = load_config(name)
    if dtype != "auto":
        config.dtype = getattr(torch, dtype)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a bad config raises anything, down to ZeroDivisionError
        raise ModelError(f"{name}: its config makes no causal language model: {first_line(error)}") from None
    return model
