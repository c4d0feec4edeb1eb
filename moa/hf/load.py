"""Load a Hugging Face model and tokenizer, with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moa.errors import ModelError


def load_model(name: str, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """A causal language model in eval mode, from a folder or a hub id; never runs code that comes with it.

    Args:
        name: folder or hub id.
        dtype: "auto" for the checkpoint's own, else a torch dtype's name.
        device_map: as in transformers.

    Raises:
        ModelError: there is no such model, its files are damaged, or transformers has no class for it.
    """
    check_folder(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device_map, attn_implementation="sdpa"
        )
    except SafetensorError as error:
        raise ModelError(
            f"{name}: a weights file is damaged or cut short ({error}); copy or download it again"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{name}: cannot be loaded as a causal language model: {_first_line(error)}") from None
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer.

    Raises:
        ModelError: there is none, or it is a slow one (calibration texts need character offsets).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged tokenizer.json
        if type(error) is not Exception:
            raise
        raise ModelError(f"{name}: its tokenizer file is damaged: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer is a slow one; convert it to tokenizer.json first")
    return tokenizer


def check_folder(name: str) -> None:
    """What a folder must hold, said before transformers takes the name for a hub id."""
    folder = Path(name)
    if not folder.exists():
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
