"""Attach a plan to a transformers model, reversibly: generate(), forward() and pipelines then run under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn, Self

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from moa.errors import ModelError, UsageError
from moa.hf import attention
from moa.hf.cache import MoaCache, Switch, Usage
from moa.hf.shape import check_plan, text_config, unwrapped
from moa.hf.summary import dense_bytes, plan_lines, usage_lines
from moa.hf.support import attention_modules, check_model, native_windows
from moa.kernels.dispatch import Backend, get_backend, new_memory
from moa.kernels.storage import ByteCount
from moa.plan import PLAN_NAME, Plan, load_plan

PREPARE_CACHE, SAVE = "_prepare_cache_for_generation", "save_pretrained"


def apply(
    model: PreTrainedModel,
    plan: Plan | str | Path,
    *,
    backend: str = "torch",
    kv_dtype: str | None = None,
    prefill_chunk: int | None = None,
    allow_other_weights: bool = False,
) -> Attachment:
    """Run `model` under `plan` until the attachment is detached; also a context manager: `with apply(model, plan): ...`.

    Args:
        model: a transformers causal LM; of a PEFT wrapper, the model inside is attached to, so either may be called.
        plan: the plan, made for this model, or where `load_plan` finds it: file, folder or hub repository.
        backend: "torch", "triton" (CUDA), or "reference" (accuracy only: saves no memory).
        kv_dtype: with "triton", "int8" or "fp8" (E4M3) quantises keys and values beyond the sinks; None keeps the model's.
        prefill_chunk: tokens of a prompt that generate() computes at a time, which bounds its memory and changes no token;
            a `prefill_chunk_size` of the call's own wins. None for the whole prompt at once.
        allow_other_weights: accept a plan made for other weights of the same shape.

    Raises:
        PlanError: there is no such plan, or it is for another model.
        HubError: the plan cannot be had from the hub.
        ModelError: the model cannot run under a plan, or has one already.
        UsageError: there is no such backend, it cannot run here, or knows no `kv_dtype`; `prefill_chunk` is no whole number
            of at least 1; or `plan` is neither a plan nor a place.
    """
    if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
        raise UsageError(f"prefill_chunk must be at least 1 token, a whole number, got {prefill_chunk!r}")
    if not isinstance(plan, Plan | str | Path):
        raise UsageError(f"wanted a plan, or the file, folder or hub id of one, got {type(plan).__name__}")
    chosen = get_backend(backend)
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    given, model = model, unwrapped(model)
    check_model(model)
    if "moa" in vars(model):
        raise ModelError("a plan is already applied to this model; call model.moa.detach() first")
    if any(map(attention.is_bound, attention_modules(model).values())):
        raise ModelError(
            "a plan is already applied to another model that has the same layers; call its moa.detach() first"
        )
    check_plan(model, plan, allow_other_weights=allow_other_weights)
    return Attachment(model, plan, chosen, kv_dtype, prefill_chunk, given)


class Attachment:
    """A plan at work on a model; `model.moa` while it lasts.

    Leaving the `with` block, also by an exception, or calling `detach()` puts the model back as it was.
    Caches come from `new_cache()`; a stock transformers cache is refused, since it would keep every token.
    Threads may generate at the same time, each with a cache of its own; `disabled()` and `detach()` are for all of them.
    `model.save_pretrained` saves the plan beside the model, in a file of its own, so that `apply` takes the folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        backend: Backend,
        kv_dtype: str | None = None,
        prefill_chunk: int | None = None,
        outermost: nn.Module | None = None,
    ) -> None:
        self.plan = plan
        self._model = model
        self._backend = backend
        self._switch = Switch()
        self._usage = Usage(ByteCount())
        windows = native_windows(text_config(model))
        self._template = new_memory(backend.name, plan.span_rules, windows, kv_dtype=kv_dtype)
        self.kv_dtype, self.prefill_chunk = kv_dtype, prefill_chunk
        self._lock, self._disabling = Lock(), 0
        self._undo = ExitStack()
        try:
            self._attach(self._undo, windows, outermost)
        except BaseException:
            self._undo.close()
            raise

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._backend.name

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that the latest cache has allocated, or had when it was dropped."""
        return self._usage.bytes.allocated

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes that transformers' own cache would hold in place of the latest one."""
        return dense_bytes(text_config(self._model), self.plan.model, self._model.dtype, self._usage)

    def summary(self) -> str:
        """Plan, spans, KV bytes beside dense ones, backend, and how it attended last: a line each."""
        how = f"backend {self._backend.name}: {self._backend.note}"
        if self.kv_dtype:
            how += f"; KV beyond the sinks in {self.kv_dtype}"
        if not self._switch.on:
            how = "disabled: the model runs dense"
        return "\n".join((*plan_lines(self.plan), *usage_lines(self._usage, self.dense_kv_bytes), how))

    def new_cache(self, pinned_tokens: int | None = None) -> MoaCache:
        """An empty cache for one batch.

        Args:
            pinned_tokens: for pinned plans, the length of a row when all is generated, padding included; None pins a
                row to the tokens of its first step.

        Raises:
            UsageError: `pinned_tokens` is below 1.
        """
        if pinned_tokens is not None and pinned_tokens < 1:
            raise UsageError(f"pinned_tokens must be at least 1, got {pinned_tokens}")
        cache = MoaCache(self._template.fresh(), self._switch, pinned_tokens)
        self._usage = cache.usage
        return cache

    @contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Run the model dense for a while: `with model.moa.disabled(): ...`; several at a time end with the last one."""
        with self._lock:
            self._disabling += 1
            self._turn_off()
        try:
            yield self._model
        finally:
            with self._lock:
                self._disabling -= 1
                self._turn_on()

    def _turn_off(self) -> None:
        if self._switch.on:
            self._switch.on = False
            _restore(self._original)

    def _turn_on(self) -> None:
        """Unless somebody else still wants it off, or it was detached meanwhile."""
        if not self._disabling and vars(self._model).get("moa") is self:
            _restore(self._applied)
            self._switch.on = True

    def detach(self) -> None:
        """Put the model back as it was; repeating it changes nothing."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refused, for a copied or pickled model would run by this one's plan, or by none.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "a model cannot be copied or pickled while a plan is applied to it; call model.moa.detach() first, then apply "
            "the plan to each; model.save_pretrained saves a model with its plan"
        )

    def _attach(self, undo: ExitStack, windows: tuple[int | None, ...], outermost: nn.Module | None) -> None:
        model = self._model
        attention.register()
        for layer, module in attention_modules(model).items():
            undo.callback(attention.unbind, module)
            attention.bind(module, attention.Binding(layer, windows[layer], self._template))
        self._original = _implementations(model)
        undo.callback(_restore, self._original)
        model.set_attn_implementation(attention.NAME)
        if text_config(model)._attn_implementation != attention.NAME:
            raise ModelError(f"{type(model).__name__} did not take the attention implementation {attention.NAME!r}")
        self._applied = _implementations(model)
        undo.callback(model.base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        _set(undo, model, PREPARE_CACHE, self._cache_maker(getattr(model, PREPARE_CACHE, None)))
        for saved in {id(m): m for m in (model, outermost or model)}.values():
            _set(undo, saved, SAVE, self._saver(saved.save_pretrained))  # type: ignore[arg-type]  # typed as any module
        _set(undo, model, "moa", self)
        undo.callback(setattr, self._switch, "on", False)

    def _cache_maker(self, stock: Callable[..., Any] | None) -> Callable[..., Any]:
        """What generate() calls to get its cache, in place of the `stock` method."""

        def prepare(config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self._switch.on and config.use_cache is not False and model_kwargs.get("past_key_values") is None:
                if config.cache_implementation is not None:
                    raise ModelError(
                        f"cache_implementation={config.cache_implementation!r} keeps every token; "
                        "leave it out, or run dense: `with model.moa.disabled():`"
                    )
                config.prefill_chunk_size = config.prefill_chunk_size or self.prefill_chunk  # generate()'s own copy
                pinned = config.max_length if self.plan.length_mode == "pinned" else None
                model_kwargs["past_key_values"] = self.new_cache(pinned)
                return None
            return stock(config, model_kwargs, *args, **kwargs) if stock else None

        return prepare

    def _saver(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """What saves the plan with the model, in place of the `stock` method."""

        @wraps(stock)
        def save(save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("push_to_hub"):
                raise UsageError(
                    "save_pretrained(push_to_hub=True) would push the model without its plan; "
                    "call model.push_to_hub(repository), which pushes both"
                )
            saved = stock(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                self.plan.save(Path(save_directory) / PLAN_NAME)
            return saved

        return save

    def _before_forward(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a forward call its cache, where transformers would make one of its own."""
        if not self._switch.on:
            return None
        self._refuse(module.config._attn_implementation, bool(kwargs.get("output_attentions")))
        cache = kwargs.get("past_key_values")
        if cache is None:
            wanted = kwargs.get("use_cache")
            if wanted if wanted is not None else getattr(module.config, "use_cache", False):
                return args, {**kwargs, "past_key_values": self.new_cache()}
            return None
        if not isinstance(cache, MoaCache):
            raise ModelError(
                f"past_key_values is a {type(cache).__name__}, which would keep every token; "
                "pass model.moa.new_cache(), or leave it out"
            )
        if cache.memory.table is not self._template.table:
            raise ModelError("past_key_values was made under another attachment; pass model.moa.new_cache()")
        self._usage = cache.usage
        return None

    def _refuse(self, implementation: str | None, wants_weights: bool) -> None:
        """What a forward call cannot have."""
        if implementation != attention.NAME:
            raise ModelError(
                f"the attention implementation was set to {implementation!r} after the plan was applied; "
                "call model.moa.detach() first, or run dense: `with model.moa.disabled():`"
            )
        if wants_weights:
            raise ModelError(
                "output_attentions=True: no attention weights are made under a plan; "
                "run dense with eager attention for them: `with model.moa.disabled():`"
            )


def _set(undo: ExitStack, target: Any, name: str, value: Any) -> None:
    """Set an instance attribute, to be put back as it was."""
    own = vars(target)
    if name in own:
        undo.callback(setattr, target, name, own[name])
    else:
        undo.callback(own.pop, name, None)
    setattr(target, name, value)


def _implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """The attention implementation of every config in a model."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return [(config, config._attn_implementation) for config in configs.values()]


def _restore(implementations: list[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation = implementation
