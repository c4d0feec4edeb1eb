"""Seconds and bytes, dense beside a plan: the same run, the same tokens, rounds interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from moa.devices import compute_devices, input_device
from moa.errors import UsageError
from moa.eval.conditions import environment
from moa.eval.records import SideSpeed, Speed, Spread
from moa.hf.apply import Attachment, apply
from moa.hf.cache import MoaCache
from moa.hf.shape import text_config
from moa.plan import Plan

DENSE_ATTENTION = "sdpa"


@dataclass(frozen=True, slots=True)
class _Side:
    """How one side runs; `enter` switches the model over."""

    enter: Callable[[], AbstractContextManager[object]]
    new_cache: Callable[[], Cache]


@dataclass(frozen=True, slots=True)
class _Turn:
    prefill_s: float
    decode_s: float
    kv_bytes: int


def measure_speed(
    model: PreTrainedModel,
    plan: Plan,
    *,
    length_tokens: int,
    decode_tokens: int = 32,
    rounds: int = 3,
    backend: str = "torch",
    seed: int = 0,
    allow_other_weights: bool = False,
) -> Speed:
    """Prefill seconds, decode tokens/s and KV bytes of one sequence, dense beside `plan`.

    Each side runs once to warm up, then in turn for `rounds` rounds: `length_tokens - decode_tokens` random tokens are
    prefilled in one call, then one token at a time is decoded until the cache holds `length_tokens`. Dense is the
    model as transformers runs it, with sdpa and a DynamicCache. The model is left as it was found.

    Args:
        model: a transformers causal LM without a plan applied.
        plan: the plan, made for this model.
        length_tokens: tokens in the cache at the end, where KV bytes are taken.
        decode_tokens: of them decoded.
        rounds: measured rounds; the report shows their median, least and greatest.
        backend: "torch" or a faster one.
        seed: of the tokens.
        allow_other_weights: as in `apply`.

    Raises:
        UsageError: lengths or rounds that cannot be measured, or a backend that is for accuracy only.
        PlanError, ModelError: as `apply`.
    """
    prompt_tokens = length_tokens - decode_tokens
    if prompt_tokens < 1 or decode_tokens < 1 or rounds < 1:
        raise UsageError(f"cannot measure {rounds} rounds of {decode_tokens} decoded tokens of {length_tokens}")
    if backend == "reference":
        raise UsageError(
            "the reference backend is for accuracy only, it saves neither memory nor time; use --backend torch"
        )
    with _sdpa(model), apply(model, plan, backend=backend, allow_other_weights=allow_other_weights) as attached:
        prompt = _tokens(model, prompt_tokens, seed)
        turns = _interleaved(model, _sides(model, attached, length_tokens), prompt, decode_tokens, rounds)
        return Speed(
            plan_sha256=plan.sha256,
            density_ratio=plan.span_rules.density_ratio(length_tokens),
            length_tokens=length_tokens,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            rounds=rounds,
            seed=seed,
            environment=environment(model),
            dense=_side_speed(DENSE_ATTENTION, turns[0], decode_tokens),
            sparse=_side_speed(attached.backend, turns[1], decode_tokens),
        )


@contextmanager
def _sdpa(model: PreTrainedModel) -> Iterator[None]:
    """The model with transformers' sdpa attention, whatever it has now."""
    before = model.config._attn_implementation
    model.set_attn_implementation(DENSE_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _tokens(model: PreTrainedModel, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(text_config(model).vocab_size, (1, count), generator=generator).to(
        input_device(model)
    )  # [1, N]


def _sides(model: PreTrainedModel, attached: Attachment, length_tokens: int) -> tuple[_Side, _Side]:
    dense = _Side(attached.disabled, lambda: DynamicCache(config=model.config))
    return dense, _Side(nullcontext, lambda: attached.new_cache(length_tokens))


def _interleaved(
    model: PreTrainedModel, sides: tuple[_Side, _Side], prompt: Tensor, decode_tokens: int, rounds: int
) -> tuple[list[_Turn], list[_Turn]]:
    """Turns of both sides; which one goes first changes every round, the first round is warm-up and left out."""
    turns: tuple[list[_Turn], list[_Turn]] = ([], [])
    for i in range(rounds + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            turn = _turn(model, sides[side], prompt, decode_tokens)
            if i:
                turns[side].append(turn)
    return turns


@torch.no_grad()
def _turn(model: PreTrainedModel, side: _Side, prompt: Tensor, decode_tokens: int) -> _Turn:
    with side.enter():
        cache = side.new_cache()
        begin = _now(model)
        token = _step(model, prompt, cache)
        prefilled = _now(model)
        for _ in range(decode_tokens):
            token = _step(model, token, cache)
        return _Turn(prefilled - begin, _now(model) - prefilled, kv_bytes(cache))


def _step(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """The greedy next token [1, 1] after `tokens` [1, T]."""
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # [1, 1, V]
    return logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]  # transformers' outputs are untyped


def _now(model: PreTrainedModel) -> float:
    """Seconds on a steady clock, after all work on the devices is done."""
    for device in compute_devices(model):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()


def kv_bytes(cache: Cache) -> int:
    """Bytes that a cache has allocated for keys and values, measured from its storage."""
    if isinstance(cache, MoaCache):
        return cache.kv_bytes
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    tensors = (tensor for tensor in held if isinstance(tensor, Tensor))
    # one storage may hold several tensors; a sliding layer's tensors are views of larger storage
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _side_speed(attention: str, turns: list[_Turn], decode_tokens: int) -> SideSpeed:
    return SideSpeed(
        attention=attention,
        prefill_s=Spread.of([turn.prefill_s for turn in turns]),
        decode_tokens_per_s=Spread.of([decode_tokens / turn.decode_s for turn in turns]),
        kv_bytes=max(turn.kv_bytes for turn in turns),
    )
