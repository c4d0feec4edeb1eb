"""kvpress' presses on the transformers that runs here: what they read is supplied, and nothing of them stays behind.

kvpress 0.5.5 pins transformers below 5.3. Two things stand between it and a later one:

- attention modules are called without `cache_position`, by which a press tells a prompt from an answer: a hook adds it;
- importing kvpress wraps all of transformers' attention functions for good: here they are wrapped while a press is
  attached, so that presses which only hide keys can do so, and are themselves again afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa.errors import MoaError, ModelError, UsageError, shortage
from moa.hf.load import first_line
from moa.hf.shape import text_config
from moa.hf.support import native_windows

INSTALL = "pip install --no-deps kvpress 'cachetools<6' fire termcolor  # its pins exclude this transformers"
# Where presses tell kvpress' attention functions which keys of a module to hide
HIDDEN = "masked_key_indices"
# What presses raise when they cannot press; assertions are their way to check arguments
REFUSALS = (AssertionError, ValueError, LookupError, OSError, RuntimeError)


def load_kvpress() -> ModuleType:
    """kvpress itself, without what its import does to transformers' attention functions.

    Raises:
        MoaError: it is not installed, or cannot be imported.
    """
    if find_spec("kvpress") is None:
        raise MoaError(f"kvpress is not installed; run: {INSTALL}")
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fire, which it imports
            import kvpress
    except ImportError as error:
        raise MoaError(f"kvpress cannot be imported: {first_line(error)}; run: {INSTALL}") from None
    finally:
        _put_back(before)
    loaded: ModuleType = kvpress
    return loaded


class Prompt(NamedTuple):
    """A prompt that was pressed.

    Args:
        cache: what its keys and values were pressed to.
        held: keys that later tokens see, over all layers and KV heads.
        hidden: keys are there, but hidden from later tokens: no memory is saved.
    """

    cache: DynamicCache
    held: int
    hidden: bool

    @property
    def one_by_one(self) -> bool:
        """Later tokens must come one at a time: one mask does not fit all layers, or keys are hidden for one query."""
        return self.hidden or len({keys.shape[2] for keys in _keys(self.cache)}) > 1


class PressedModel:
    """A model whose prompts a press compresses; leaving the `with` block leaves no trace of either.

    Args:
        model: a transformers causal LM of Llama's layout (`model.model.layers[i].self_attn`), without windows of its own.
        press: of kvpress, or one that follows its protocol: `press(model)` is a context in which a prompt is compressed.
        eager: the press reads attention weights, which only eager attention has; it computes prompts, nothing else.

    Raises:
        ModelError: the model has another layout, or sliding windows.
        UsageError: the press refuses the model.
    """

    def __init__(self, model: PreTrainedModel, press: Any, *, eager: bool = False) -> None:
        self._model, self._press, self._eager = model, press, eager
        self._modules = _attention_modules(model)
        self._undo = ExitStack()
        with refusing(press):
            press.post_init_from_model(model)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(_masking())
            for module in self._modules:
                undo.callback(_remove_additions, module, {*vars(module)}, {name for name, _ in module.named_children()})
                hook = module.register_forward_pre_hook(_add_cache_position, with_kwargs=True)
                undo.callback(hook.remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def prefill(self, ids: Tensor, compression_ratio: float | None = None) -> Prompt:
        """Compute a prompt densely and press it.

        Args:
            ids: int64 [1, n].
            compression_ratio: share of keys that the press removes; None for a press that has its own.

        Raises:
            UsageError: the press refuses the prompt, for example one shorter than its window.
        """
        cache = DynamicCache()
        for module in self._modules:
            setattr(module, HIDDEN, None)  # those of the prompt before
        with torch.no_grad(), self._attending():
            if compression_ratio == 0:
                self._base(input_ids=ids, past_key_values=cache)
            else:
                with refusing(self._press):
                    if compression_ratio is not None:
                        self._press.compression_ratio = compression_ratio
                    with self._press(self._model):
                        self._base(input_ids=ids, past_key_values=cache)
        return self._prompt(cache)

    @property
    def _base(self) -> Any:
        """The model without its head."""
        return self._model.model

    def _prompt(self, cache: DynamicCache) -> Prompt:
        kept = sum(keys.shape[:3].numel() for keys in _keys(cache))  # of [B, HKV, n, D]
        hidden = sum(len(indices[0]) for module in self._modules if (indices := getattr(module, HIDDEN)) is not None)
        return Prompt(cache, kept - hidden, hidden > 0)

    @contextmanager
    def _attending(self) -> Iterator[None]:
        before = self._model.config._attn_implementation
        if self._eager:
            self._model.set_attn_implementation("eager")
        try:
            yield
        finally:
            if self._eager:
                self._model.set_attn_implementation(before)


@contextmanager
def refusing(press: Any) -> Iterator[None]:
    """Say in our words what a press refuses; that memory has run out is another matter."""
    try:
        yield
    except REFUSALS as error:
        if shortage(error) is not None:
            raise
        raise UsageError(f"{type(press).__name__} refuses: {first_line(error)}") from error


def _keys(cache: DynamicCache) -> list[Tensor]:
    """Keys of every layer, [B, HKV, n, D]; a dynamic cache has layers of no other kind."""
    return [layer.keys for layer in cache.layers]  # type: ignore[union-attr, misc]


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    layers = getattr(getattr(model, "model", None), "layers", None)
    modules = [getattr(layer, "self_attn", None) for layer in layers or ()]
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise ModelError(f"{type(model).__name__} has no model.layers[i].self_attn, where presses of kvpress attach")
    if any(native_windows(text_config(model))):
        raise ModelError(f"{type(model).__name__} has sliding windows, whose caches presses cannot compress")
    return [module for module in modules if module is not None]


def _add_cache_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give an attention module the `cache_position` that transformers gave it until 5.2: slots of this step's tokens."""
    cache = kwargs.get("past_key_values")
    if cache is None or "cache_position" in kwargs:
        return None
    hidden = kwargs["hidden_states"]  # [B, T, width]
    seen = cache.get_seq_length(module.layer_idx)
    return args, {**kwargs, "cache_position": torch.arange(seen, seen + hidden.shape[1], device=hidden.device)}


@contextmanager
def _masking() -> Iterator[None]:
    """Wrap attention functions as kvpress does, for presses that hide keys; without kvpress there are none."""
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    if find_spec("kvpress") is not None:
        load_kvpress()
        from kvpress.attention_patch import patch_attention_functions

        patch_attention_functions()
    try:
        yield
    finally:
        _put_back(before)


def _put_back(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        if ALL_ATTENTION_FUNCTIONS[name] is not function:
            del ALL_ATTENTION_FUNCTIONS[name]  # kvpress' is an override; below it lies what was registered
        if ALL_ATTENTION_FUNCTIONS[name] is not function:
            ALL_ATTENTION_FUNCTIONS[name] = function


def _remove_additions(module: nn.Module, attributes: set[str], children: set[str]) -> None:
    """Remove what presses leave on a module: masks, and the rotary embedding as a child."""
    for name in [name for name, _ in module.named_children() if name not in children]:
        delattr(module, name)
    for name in vars(module).keys() - attributes:
        delattr(module, name)
