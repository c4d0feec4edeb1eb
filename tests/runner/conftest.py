"""A tiny random model, a plan with small spans, texts that begin alike, and what each says when it is run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moa.hf import apply, model_shape
from moa.plan import Plan
from moa.runner.engine import Engine
from moa.runner.request import Completion, SamplingParams, Update
from moa.runner.settings import EngineSettings

VOCABULARY, OUTPUT_TOKENS = 128, 24
RULES = (((0, 0.5), (20, 0.0)), ((0, 1.0), (0, 0.25)))
# Ugly lengths; several begin alike, so that prefixes are shared at, before and behind block boundaries.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 129, 200)
BEGIN_ALIKE_TOKENS = 96


def make_model(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A two-layer Llama, 4 query and 2 KV heads, whose attention is sharp enough that one wrong key changes tokens."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.3, "pad_token_id": 0, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def make_plan(model: PreTrainedModel, **fields: object) -> Plan:
    """A plan with small spans, so that keys drop early."""
    return Plan.model_validate(
        {"model": model_shape(model), "rules": RULES, "sink_tokens": 4, "min_span_tokens": 16, **fields}
    )


def make_texts() -> list[tuple[int, ...]]:
    """Prompts of `LENGTHS`, two of each: every second one begins as the others do."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randint(3, VOCABULARY, (BEGIN_ALIKE_TOKENS,), generator=generator).tolist()
    texts = []
    for length in LENGTHS:
        for begin in (common, []):
            rest = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            texts.append(tuple((begin + rest)[-max(length, 1) :] if length < len(begin) else (begin + rest)[:length]))
    return texts


@dataclass
class Alone:
    """What transformers (no plan) or the wrapper (a plan) say to a prompt by itself: tokens and their log-probabilities."""

    model: PreTrainedModel
    plan: Plan | None = None
    known: dict[tuple[int, ...], tuple[list[int], list[float]]] = field(default_factory=dict)

    def say(self, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        """The greedy continuation of `OUTPUT_TOKENS`, and log-probabilities."""
        if prompt not in self.known:
            self.known[prompt] = self._run(torch.tensor([prompt]))
        return self.known[prompt]

    def _run(self, prompt: torch.Tensor) -> tuple[list[int], list[float]]:
        options: dict[str, Any] = {"max_new_tokens": OUTPUT_TOKENS, "do_sample": False, "eos_token_id": None}
        options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
        if self.plan is None:
            out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        else:
            with apply(self.model, self.plan):
                out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        tokens = out.sequences[0, prompt.shape[1] :].tolist()
        logprobs = torch.stack(out.logits, 1)[0].log_softmax(-1)  # [OUTPUT_TOKENS, V]
        return tokens, logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="session")
def plan(model: PreTrainedModel) -> Plan:
    return make_plan(model)


@pytest.fixture(scope="session")
def texts() -> list[tuple[int, ...]]:
    return make_texts()


@pytest.fixture(scope="session")
def alone(model: PreTrainedModel, plan: Plan) -> dict[bool, Alone]:
    """By whether there is a plan."""
    other = deepcopy(model)  # while an engine runs the one, the other is to be had
    return {False: Alone(other), True: Alone(other, plan)}


@pytest.fixture(scope="session")
def greedy() -> SamplingParams:
    return SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, Completion]]:
    """`run(engine, arrivals, cancels)`: drives an engine to its end.

    `arrivals` maps a step's number to requests (name, prompt, sampling) that come before it, `cancels` to names. Afterwards
    every request must have ended exactly once, and all memory must be back.
    """
    return drive


def drive(
    engine: Engine,
    arrivals: dict[int, list[tuple[str, tuple[int, ...], SamplingParams]]],
    cancels: dict[int, list[str]] | None = None,
) -> dict[str, Completion]:
    told: dict[tuple[str, int], list[Update]] = {}
    asked: list[str] = []
    step, last = 0, max([*arrivals, *(cancels or {})], default=0)
    while step <= last or not engine.is_idle:
        for name, prompt, sampling in arrivals.get(step, ()):
            engine.add(prompt, sampling, name)
            asked += [f"{name}/{i}" if sampling.n > 1 else name for i in range(sampling.n)]
        for name in (cancels or {}).get(step, ()):
            engine.cancel(name)
        for update in engine.step():
            told.setdefault((update.name, update.index), []).append(update)
        step += 1
        assert step < 20_000, "the engine makes no progress"
    for updates in told.values():
        assert [update.finish is not None for update in updates] == [False] * (len(updates) - 1) + [True]
    assert len(told) == len(asked)
    check_memory_is_back(engine)
    completions = [Completion.of(updates) for updates in told.values()]
    several = {name for name, index in told if index}
    return {f"{c.name}/{c.index}" if c.name in several else c.name: c for c in completions}


def check_memory_is_back(engine: Engine) -> None:
    """Nothing is held but what the prefix cache keeps, which the account knows; then not even that."""
    account, host = engine.host.account, engine.host
    assert account.used_slots == host.cached_slots
    assert len(host.memory.sequences) == account.holders == (0 if host.cache is None else len(host.cache))
    host.clear()
    assert (account.used_slots, account.holders, host.cached_slots, host.memory.kv_bytes) == (0, 0, 0, 0)


@pytest.fixture(scope="session")
def memory_is_back() -> Callable[[Engine], None]:
    return check_memory_is_back


@pytest.fixture
def make_engine(model: PreTrainedModel, plan: Plan) -> Iterator[Callable[..., Engine]]:
    """`make_engine(planned, **settings)`: an engine that is closed at the end of the test."""
    engines: list[Engine] = []

    def make(planned: bool = True, **settings: Any) -> Engine:
        for engine in engines:
            engine.close()
        engines.append(Engine(model, plan if planned else None, EngineSettings(**settings)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of a token in all layers and heads."""
    return 2 * 2 * 2 * 16 * 4
