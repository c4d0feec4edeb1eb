"""Presses of NVIDIA's kvpress as ways of running a model, at the KV bytes of a plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moa.errors import UsageError, closest
from moa.eval.lm import MoaLM
from moa.eval.paired.kv_size import KvUse, kv_sizes
from moa.eval.paired.records import EQUAL_BYTES_RATIO
from moa.eval.paired.run import Way
from moa.hf.shape import unwrapped
from moa.integrations.presses import PressedModel, Prompt, load_kvpress, refusing
from moa.plan import Plan

# H2O's place among presses
ALIASES = {"h2o": "observedattention"}
# The press that reads attention weights, which only eager attention gives
READS_WEIGHTS = "ObservedAttentionPress"
H2O_NOTE = (
    "like H2O (arXiv 2306.14048): keys by the mean attention that the prompt pays them; unlike it, no recent window is set "
    "aside and nothing is evicted while decoding"
)
NO_PROMPT_PRESS = "it evicts while an answer is written; here a press acts once, after the prompt"
MOVES_KEYS = "it gives kept keys new positions, which answers here do not follow"
REFUSED = {
    "BasePress": "it is what presses are made from",
    "ScorerPress": "it is what presses are made from",
    "CAMPress": NO_PROMPT_PRESS,
    "CompressionRatioDecodingPress": NO_PROMPT_PRESS,
    "DecodingPress": NO_PROMPT_PRESS,
    "PrefillDecodingPress": NO_PROMPT_PRESS,
    "FinchPress": "it needs a delimiter between context and question, which tasks here do not write",
    "KeyRerotationPress": MOVES_KEYS,
    "RestoreKVPress": MOVES_KEYS,
}


def press_way(name: str, plan: Plan, model: PreTrainedModel, *, equal_to: str) -> Way:
    """A press at a plan's KV bytes: every prompt keeps as many keys as the plan would, to a token per head.

    Args:
        name: of the press in kvpress, without "Press" and in any case: `snapkv`, `expected_attention`, `h2o` for
            ObservedAttentionPress; `adakv_snapkv` for a press inside another one.
        plan: whose bytes are matched, prompt by prompt.
        model: that will be run; tried for what a press says of it at once.
        equal_to: name of the plan's variant.

    Raises:
        MoaError: kvpress is not installed.
        UsageError: there is no such press, or it cannot be run this way; says why.
        ModelError: the model is none that presses can attach to.
    """
    kvpress = load_kvpress()
    press = make_press(name, kvpress)
    eager = any(type(each).__name__ == READS_WEIGHTS for each in _nested(press))
    PressedModel(unwrapped(model), press, eager=eager)
    run = _PressRun(plan, press, eager)
    return Way(
        f"kvpress-{name}",
        run.attach,
        settings=_settings(press, eager),
        kv=run.kv_use,
        equal_to=equal_to,
    )


def make_press(name: str, kvpress: ModuleType) -> Any:
    """The press called `name`, with kvpress' own defaults; see `press_way`."""
    known = {_plain(each): press for each in kvpress.__all__ if _is_press(press := getattr(kvpress, each), kvpress)}
    wanted = _plain(name)
    if (one := known.get(ALIASES.get(wanted, wanted))) is not None:
        return _made(name, one)
    parts = name.split("_")
    for i in range(1, len(parts)):
        outer, inner = known.get(_plain("_".join(parts[:i]))), "_".join(parts[i:])
        if outer is not None and "press" in inspect.signature(outer).parameters:
            return _made(name, outer, press=make_press(inner, kvpress))
    raise UsageError(f"kvpress {version('kvpress')} has no press {name!r}{closest(wanted, (*known, *ALIASES))}")


def _made(name: str, kind: type, **inside: Any) -> Any:
    if kind.__name__ in REFUSED:
        raise UsageError(f"kvpress:{name} cannot be run here: {REFUSED[kind.__name__]}")
    try:
        with refusing(kind):
            press = kind(**inside)
    except TypeError as error:
        if "press" in inspect.signature(kind).parameters and not inside:
            raise UsageError(f"kvpress:{name} needs a press inside, as in kvpress:{name}_snapkv") from None
        raise UsageError(f"kvpress:{name} needs more than a name can say: {error}") from None
    try:
        press.compression_ratio = 0.5
    except AttributeError:
        settable = False
    else:
        settable = hasattr(kind, "compression_ratio")
    if not settable:
        raise UsageError(f"kvpress:{name} takes no compression_ratio, so it cannot be given a plan's KV bytes")
    return press


def _is_press(kind: object, kvpress: ModuleType) -> bool:
    return isinstance(kind, type) and issubclass(kind, kvpress.BasePress)


def _plain(name: str) -> str:
    """A press's name without what spellings differ in."""
    return name.lower().replace("_", "").replace("-", "").removesuffix("press")


def _nested(press: Any) -> Iterator[Any]:
    """A press and the presses inside it."""
    while press is not None:
        yield press
        press = getattr(press, "press", None)


def _settings(press: Any, eager: bool) -> dict[str, str]:
    told = {"kvpress": version("kvpress"), "press": " of ".join(type(each).__name__ for each in _nested(press))}
    for each in _nested(press):
        for own in fields(each):
            value = getattr(each, own.name, None)
            if own.init and own.name != "compression_ratio" and isinstance(value, bool | int | float | str):
                told[own.name] = f"{value}"
    if any(type(each).__name__ == READS_WEIGHTS for each in _nested(press)):
        told["selection"] = H2O_NOTE
    told["compression_ratio"] = "1 - the plan's density, prompt by prompt"
    told["prompt"] = "prefilled dense" + (" with eager attention" if eager else "") + ", then compressed once"
    return told


@dataclass(slots=True)
class _PressRun:
    """A press at work, and what it held after each prompt.

    Args:
        held: per prompt its tokens, and the keys kept over all layers and KV heads.
        hidden: a prompt's keys were hidden, not freed.
        excess_ratio: by how much the KV of a text with its answer exceeded the plan's, at most.
    """

    plan: Plan
    press: Any
    eager: bool
    held: list[tuple[int, int]] = field(default_factory=list)
    hidden: bool = False
    excess_ratio: float = 0.0
    _open: tuple[Prompt, int] | None = None  # the last prompt, and the slots of its first layer before the answer

    @contextmanager
    def attach(self, lm: MoaLM) -> Iterator[None]:
        """Compress every prompt while the context lasts."""
        with PressedModel(unwrapped(lm.model), self.press, eager=self.eager) as pressed:

            def prefill(ids: Tensor) -> Prompt:
                self._close()
                prompt = pressed.prefill(ids, 1 - self.plan.span_rules.density_ratio(ids.shape[1]))
                self.held.append((ids.shape[1], prompt.held))
                self.hidden |= prompt.hidden
                self._open = prompt, prompt.cache.get_seq_length()
                return prompt

            with lm.compressing(prefill):
                yield
            self._close()

    def _close(self) -> None:
        """Count what the answer to the last prompt has added."""
        if self._open is None:
            return
        prompt, slots = self._open
        added = prompt.cache.get_seq_length() - slots
        held = prompt.held + added * self.plan.model.layers * self.plan.model.kv_heads
        self.excess_ratio = max(self.excess_ratio, held / self._planned(self.held[-1][0] + added) - 1)
        self._open = None

    def kv_use(self, model: PreTrainedModel, lengths_tokens: Sequence[int]) -> KvUse:
        """The plan's bytes, times what was held after each length's prompts over what the plan holds after them."""
        ratios = {
            n: sum(held for _, held in prompts) / sum(self._planned(tokens) for tokens, _ in prompts)
            for n, prompts in self._by_length(lengths_tokens).items()
        }
        sizes = tuple(
            size.model_copy(update={"kv_bytes": round(ratios[size.length_tokens] * size.kv_bytes)})
            for size in kv_sizes(model, lengths_tokens, self.plan.span_rules)
            if size.length_tokens in ratios
        )
        notes = {"answers": "what they add is never evicted"}
        if self.excess_ratio > EQUAL_BYTES_RATIO:
            notes["answers"] += f": up to {self.excess_ratio:.0%} more KV than the plan at a text's end"
        return KvUse(sizes, not self.hidden, notes)

    def _planned(self, n_tokens: int) -> int:
        """Keys that the plan keeps of a text, over all layers and KV heads."""
        return int(self.plan.span_rules.span(n_tokens).sum())

    def _by_length(self, lengths_tokens: Sequence[int]) -> Mapping[int, list[tuple[int, int]]]:
        """Prompts by the least of the lengths that holds them."""
        found: dict[int, list[tuple[int, int]]] = {}
        for prompt in self.held:
            fitting = [n for n in lengths_tokens if prompt[0] <= n]
            if fitting:
                found.setdefault(min(fitting), []).append(prompt)
        return found
