"""Sampling: held against plain loops over one row; a request's draw depends on its seed and place alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import UsageError
from moa.runner.request import SamplingParams
from moa.runner.sampling import Bias, Draw, Said, logprobs_of, sample, uniforms

V = 40


def logits_of(seed: int, rows: int = 1, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


def plain_choice(row: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int], u: float) -> int:
    """One token by the definitions, in float64 and with loops over the vocabulary."""
    values = row.double().tolist()
    for token in range(V):
        if token in prompt or token in output:
            values[token] = (
                values[token] / params.repetition_penalty
                if values[token] > 0
                else (values[token] * params.repetition_penalty)
            )
        values[token] -= params.presence_penalty * (token in output)
        values[token] -= params.frequency_penalty * output.count(token)
        values[token] += dict(params.biases).get(token, 0.0)
    if not params.temperature:
        return max(range(V), key=lambda token: values[token])
    top = max(values)
    weights = {token: math.exp((value - top) / params.temperature) for token, value in enumerate(values)}
    kept = sorted(weights, key=lambda token: -weights[token])[: params.top_k or V]
    total, before, within = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before < params.top_p and weights[token] >= params.min_p:
            within.append(token)
        before += weights[token] / total
    order = within if params.cuts_tail else sorted(within)
    point, done = u * sum(weights[token] for token in order), 0.0
    for token in order:
        done += weights[token]
        if done > point:
            return token
    return order[-1]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 39, 500]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.7, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {3: 5.0, 39: -100.0}]),
)
SAID = st.lists(st.integers(0, V - 1), max_size=12)


@settings(max_examples=150)
@given(st.lists(st.tuples(PARAMS, SAID, SAID, st.integers(0, 2**64 - 1), st.integers(0, 5000)), min_size=1, max_size=9))
def test_all_rows_at_once_are_each_by_definition(rows) -> None:
    logits = logits_of(7, len(rows))
    before = logits.clone()
    draws = [
        Draw(p, seed, place, Said(prompt, output) if p.has_penalties else None, Bias.of(p))
        for p, prompt, output, seed, place in rows
    ]
    got = sample(logits, draws).tokens
    assert torch.equal(logits, before)
    for row, (p, prompt, output, seed, place), token in zip(logits, rows, got, strict=True):
        assert token == plain_choice(row, p, prompt, output, float(uniforms([seed], [place])[0]))


def test_draws_follow_the_distribution() -> None:
    logits, count = logits_of(3, spread=1.0), 20_000
    params = SamplingParams(temperature=0.8)
    tokens = sample(logits.expand(count, V), [Draw(params, 11, place) for place in range(count)]).tokens
    share = np.bincount(tokens, minlength=V) / count
    want = torch.softmax(logits[0].double() / 0.8, -1).numpy()
    assert np.abs(share - want).max() < 5 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.999)])
def test_draws_from_a_large_vocabulary_follow_it_too(params) -> None:
    """With blocks of it without any weight, and a last one that is not full."""
    size, count = 5_003, 4_000
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(4))
    logits[:, 256:1024] = -math.inf
    logits[:, -1] = 6.0
    draws = [Draw(params, 5, place) for place in range(count)]
    tokens = np.array(sample(logits.expand(count, size), draws).tokens)
    assert not ((tokens >= 256) & (tokens < 1024)).any()
    want = torch.softmax(logits[0].double(), -1).numpy()
    for first, last in [(0, 256), (1024, 3000), (3000, 5_002), (5_002, 5_003)]:
        share = ((tokens >= first) & (tokens < last)).mean()
        assert abs(share - want[first:last].sum()) < 5 * math.sqrt(0.25 / count)


def test_numbers_are_uniform_and_differ_by_seed_and_place() -> None:
    numbers = uniforms([seed for seed in range(100) for _ in range(100)], list(range(100)) * 100)
    assert len(set(numbers.tolist())) == 10_000
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert (
        np.abs(np.sort(numbers) - (np.arange(10_000) + 0.5) / 10_000).max() < 0.02
    )  # Kolmogorov-Smirnov, p far below 1e-3


@pytest.mark.parametrize("tail", [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.02}, {}])
def test_equal_logits_are_drawn_alike_in_any_company(tail) -> None:
    """As half precision has them; others look at more tokens, and the rows of a step are looked at together."""
    size = 3_000
    row = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    params = SamplingParams(temperature=1.0, **tail)
    other = SamplingParams(temperature=1.0, top_k=500)
    for place in range(60):
        alone = sample(row[None], [Draw(params, 3, place)]).tokens[0]
        both = sample(torch.stack([torch.zeros(size), row]), [Draw(other, 4, place), Draw(params, 3, place)])
        assert both.tokens[1] == alone


@pytest.mark.parametrize("spread", [3.0, 1e37])
@pytest.mark.parametrize("tail", [{"top_p": 0.9}, {}])
@pytest.mark.parametrize("params", [{"temperature": 1e-40}, {"temperature": 1.1e-5}, {"repetition_penalty": 0.01}])
def test_no_legal_number_gives_a_token_that_is_none(params, tail, spread) -> None:
    sampling = SamplingParams(**{"temperature": 1.0, **params, **tail})
    said = Said(range(V)) if sampling.has_penalties else None
    (token,) = sample(logits_of(5, spread=spread), [Draw(sampling, 1, 1, said)]).tokens
    assert token is None or 0 <= token < V
    assert token is not None or spread > 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_numbers_spoils_no_other(bad: float) -> None:
    logits = logits_of(5, 3)
    draws = [Draw(SamplingParams(temperature=t, logprobs=2), 1, 1) for t in (1.0, 1.0, 0.0)]
    want = sample(logits, draws)
    logits[1, 4] = bad
    got = sample(logits, draws)
    assert got.tokens == [want.tokens[0], None, want.tokens[2]]
    assert got.logprobs == {0: want.logprobs[0], 2: want.logprobs[2]}
    logits[1] = -math.inf
    assert sample(logits, draws).tokens[1] is None


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(9, 2)
    params = SamplingParams(logprobs=3, temperature=5.0, top_k=1, logit_bias={2: 50.0})
    row = sample(logits, [Draw(params, 1, 1, bias=Bias.of(params)), Draw(SamplingParams(), 1, 1)]).logprobs[0]
    want = logits[0].log_softmax(-1)
    assert row.token == 2
    assert row.logprob == want[2]
    assert row.rank == int((want > want[2]).sum()) + 1
    assert [token for token, _ in row.top] == want.topk(3).indices.tolist()
    (all_of_them,) = logprobs_of(logits[:1], [2], [100])
    assert len(all_of_them.top) == V


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", math.nan), ("temperature", 1e9), ("temperature", True), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -1), ("min_p", -0.1), ("max_tokens", -1), ("max_tokens", 2.0), ("n", 0), ("n", 129),
        ("seed", 1 << 64), ("seed", -1), ("logprobs", -1), ("logprobs", 101), ("prompt_logprobs", 101),
        ("repetition_penalty", 1e-3), ("presence_penalty", math.inf), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: 101}),
        ("logit_bias", dict.fromkeys(range(5000), 1.0)), ("stop", ("",)), ("stop", ("x",) * 65), ("stop_token_ids", (-1,)),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})
