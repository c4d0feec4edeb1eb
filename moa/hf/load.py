"""Load a Hugging Face model and tokenizer, with errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moa.errors import ModelError, UsageError, closest, shortage
from moa.plan import ELEMENT_BYTES


def load_model(name: str, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """A causal language model in eval mode, from a folder or a hub id; never runs code that comes with it.

    Args:
        name: folder or hub id.
        dtype: "auto" for the checkpoint's own, else a torch dtype's name.
        device_map: as in transformers.

    Raises:
        UsageError: there is no such dtype.
        ModelError: there is no such model, its files are damaged, incomplete or do not fit its config, or transformers
            has no class for it.
    """
    check_dtype(dtype)
    check_folder(name)
    try:
        load: Any = AutoModelForCausalLM.from_pretrained  # typed without the loading info
        model, info = load(
            name,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=False,
            use_safetensors=True,  # a pickle can run code
            ignore_mismatched_sizes=True,  # refused below, in words that name the weight
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ModelError(
            f"{name}: a weights file is damaged or cut short ({error}); copy or download it again"
        ) from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a bad config raises anything, down to ZeroDivisionError
        unusable = ModelError(f"{name}: cannot be loaded as a causal language model: {first_line(error)}")
        raise shortage(error) or unusable from None
    _require_whole(name, info)
    loaded: PreTrainedModel = model.eval()
    if getattr(loaded.config.get_text_config(), "attn_logit_softcapping", None):
        loaded.set_attn_implementation(
            "eager"
        )  # sdpa knows no cap on scores; before transformers 5.23 it drops it in silence
    return loaded


def check_dtype(dtype: str) -> None:
    """Refuse what is no dtype of weights.

    Raises:
        UsageError: it is neither "auto" nor a torch dtype that a plan knows.
    """
    if dtype not in ("auto", *ELEMENT_BYTES):
        raise UsageError(
            f"--dtype must be auto or one of {', '.join(ELEMENT_BYTES)}, got {dtype!r}{closest(dtype, ELEMENT_BYTES)}"
        )


def load_config(name: str) -> PreTrainedConfig:
    """A model's config, without its weights.

    Raises:
        ModelError: there is no such model, or transformers does not know its config.
    """
    check_folder(name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a bad config raises anything, down to ZeroDivisionError
        raise ModelError(f"{name}: its config makes no causal language model: {first_line(error)}") from None
    return config


def context_tokens(config: PreTrainedConfig) -> int | None:
    """The longest sequence a model says it can take, or None where it does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def _require_whole(name: str, info: Mapping[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers."""
    for weight, got, wanted in sorted(info["mismatched_keys"])[:1]:
        raise ModelError(
            f"{name}: the weights do not fit config.json: {weight} has shape {list(got)}, the config wants {list(wanted)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights are missing ({missing[0]}{', ...' if len(missing) > 1 else ''}); "
            "copy or download the model again"
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer.

    Raises:
        ModelError: there is none, or it is a slow one (calibration texts need character offsets).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception for a damaged tokenizer.json
        raise ModelError(f"{name}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer is a slow one; convert it to tokenizer.json first")
    return tokenizer


def check_folder(name: str) -> None:
    """What a folder must hold, said before transformers takes the name for a hub id."""
    folder = Path(name)
    try:
        there = folder.exists()
    except OSError as error:  # such as a name too long for any file
        raise ModelError(f"{name[:200]}: not a folder or hub id: {error.strerror}") from None
    if not there:
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise ModelError(f"{name}: no such folder; name a model folder or a hub id like 'org/model'")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{name}: not a model folder: it has no config.json")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{config}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{config}: wanted a JSON object, got {type(content).__name__}")


def first_line(error: Exception) -> str:
    """The one line of another library's error that is worth showing."""
    lines = [line.strip().rstrip(":") for line in str(error).strip().splitlines()] or [""]
    bare = isinstance(
        error, LookupError | ArithmeticError | AttributeError | TypeError
    )  # mean little without their name
    kind = f"{type(error).__name__}: " if bare else ""
    # transformers' checks of a config say the field in the first line and the reason in the second
    text = "; ".join(lines[:2]) if lines[0].startswith("Validation error") else lines[0]
    return kind + text if text else type(error).__name__
