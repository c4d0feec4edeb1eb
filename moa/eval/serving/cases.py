"""The models that serving is measured with, and what each is asked: sizes that load a small machine as large models load a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moa import demo
from moa.errors import UsageError
from moa.eval.serving.workload import Lengths, Load, Workload
from moa.hf.load import load_model
from moa.local_paths import public_name

SHIPPED, RANDOM = "demo", "random-0.1b"
WAVE_PROMPT = 16


@dataclass(frozen=True, slots=True)
class Ask:
    """Lengths and number of the requests of a run, and what decodes while they arrive.

    Args:
        prompts, outputs: lengths of requests that arrive one by one.
        count: of them.
        waves: times, evenly spaced, at which `wave` requests with short prompts arrive together, to decode
            `wave_tokens` each.
    """

    prompts: Lengths
    outputs: Lengths
    count: int
    waves: int = 0
    wave: int = 0
    wave_tokens: int = 0

    def requests(self, vocabulary: int, rate: float, seed: int, context_tokens: int | None) -> tuple[Load, ...]:
        """All of them in order of arrival; `rate` counts both kinds, per second."""
        total = self.count + self.waves * self.wave
        alone = Workload(
            self.prompts, self.outputs, self.count, vocabulary, rate * self.count / total, context_tokens=context_tokens
        )
        apart = 0.0 if math.isinf(rate) or not self.waves else total / rate / self.waves
        lengths = Lengths(WAVE_PROMPT, WAVE_PROMPT), Lengths(max(1, self.wave_tokens), max(1, self.wave_tokens))
        waves = [
            replace(load, due_s=i * apart)
            for i in range(self.waves)
            for load in Workload(*lengths, self.wave, vocabulary).requests(seed + i)
        ]
        return tuple(sorted((*waves, *alone.requests(seed)), key=lambda load: load.due_s))


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and what it is asked.

    Args:
        name, note: for tables.
        make: loads it.
        long_note: what stands in for it where texts are longer than it reads, "" if it does itself.
        make_long: makes that.
        long: prompts whose prefill takes many decode steps, arriving into running decodes.
        chat: prompts that take somewhat more than five decode steps.
        offline: what all at once is measured with.
    """

    name: str
    note: str
    make: Callable[[], PreTrainedModel]
    long_note: str
    make_long: Callable[[], PreTrainedModel]
    long: Ask
    chat: Ask
    offline: Ask


def get_case(name: str) -> Case:
    """The case of a model: of the shipped one, of `random-0.1b`, or of any other that can be loaded."""
    if name == RANDOM:
        return _random_case()
    case = _shipped_case()
    if name == SHIPPED:
        return case
    return replace(
        case,
        name=public_name(name),
        note="a model of the user's",
        make=lambda: load_model(name),
        long_note="",
        make_long=lambda: load_model(name),
    )


def get_cases(names: list[str]) -> list[Case]:
    """The cases of several models.

    Raises:
        UsageError: two of them have the same name in tables.
    """
    cases = [get_case(name) for name in names]
    if len({case.name for case in cases}) < len(cases):
        raise UsageError(f"tables call models by the last part of their names, and two of {names} have the same one")
    return cases


def _shipped_case() -> Case:
    return Case(
        SHIPPED,
        "the model that ships with moa: 6 layers, 8 query and 4 KV heads of 32",
        lambda: load_model(demo.resolve(SHIPPED)),
        "random weights of the same shape, with positions for longer texts",
        lambda: random_model(
            vocab_size=389,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=384,
        ),
        long=Ask(Lengths(3072, 3584, 2048, 3968), Lengths(8, 8), 24, waves=4, wave=24, wave_tokens=48),
        chat=Ask(Lengths(640, 768, 512, 1024), Lengths(40, 56, 8, 128), 48),
        offline=Ask(Lengths(384, 768, 64, 2048), Lengths(96, 160, 16, 256), 48),
    )


def _random_case() -> Case:
    return Case(
        RANDOM,
        "random weights, 0.1 B parameters: 12 layers of 768, 12 query and 4 KV heads of 64, MLP of 2,304, vocabulary of 8,192",
        lambda: _random(12),
        "4 of its layers",
        lambda: _random(4),
        long=Ask(Lengths(1536, 2048, 1024, 3072), Lengths(4, 4), 10, waves=5, wave=16, wave_tokens=32),
        chat=Ask(Lengths(448, 512, 384, 768), Lengths(20, 24, 8, 40), 18),
        offline=Ask(Lengths(192, 320, 64, 512), Lengths(32, 48, 8, 64), 16),
    )


def _random(layers: int) -> PreTrainedModel:
    return random_model(
        vocab_size=8192,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2304,
    )


def random_model(**sizes: Any) -> PreTrainedModel:
    """A Llama of these sizes with random weights, the same ones every time."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=32768, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return model
