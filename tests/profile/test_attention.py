"""The profiling attention is exact attention, and what it sums up is what the definition says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MistralConfig

from moa.errors import ModelError
from moa.profile import attention, torch_sweep
from moa.profile.attention import Probe, probing
from moa.profile.collect import InfluenceSettings, objective_of, profile_length
from moa.profile.reference import masked_row_loss, single_key_effects
from moa.profile.sweep import SpanGrid
from moa.spans import ElasticRule, SpanRules

SINK, LEAST, DENSITY = 3, 6, 0.25


def probe(n: int, attenuation: float = 1.0) -> Probe:
    rules = SpanRules(np.array([[0]]), np.array([[ElasticRule(0, DENSITY).beta_fixed]]), SINK, LEAST)
    return Probe(SpanGrid.for_length(n, SINK, LEAST), "joint", attenuation, rules)


@pytest.mark.parametrize(
    ("devices", "dtype", "head_dim", "hip", "want"),
    [
        (["cpu"], torch.float32, 64, None, ("torch",)),
        (["cuda:0"], torch.bfloat16, 64, None, ("triton",)),
        (["cuda:0", "cuda:1", "cpu"], torch.float32, 64, None, ("torch", "triton")),
        (["cuda:0"], torch.float64, 64, None, ("torch",)),
        (["cuda:0"], torch.float32, 1024, None, ("torch",)),
        (["cuda:0"], torch.float32, 64, "6.4", ("torch",)),
    ],
)
def test_who_will_compute_is_known_beforehand(monkeypatch, devices, dtype, head_dim, hip, want) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(attention, "find_spec", lambda name: name)  # triton is there, wherever this runs
    assert attention.backend_names(map(torch.device, devices), dtype, head_dim) == want


@pytest.mark.parametrize("n", [1, 15, 16, 17, 67])
def test_output_and_gradients_are_those_of_sdpa(make, n) -> None:
    model = make.model()
    tokens = torch.tensor([make.sample(n, 0).token_ids])
    results = []
    for name in ("sdpa", attention.NAME):
        attention.register()
        model.set_attn_implementation(name)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        with probing(probe(n)):
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            logits.square().mean().backward()
        results.append([logits, embedded.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    assert len(results[0]) > 10
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def shift_by_definition(n: int, attenuation: float) -> torch.Tensor:
    """log(lambda) on causal keys that a running rule of DENSITY drops, key by key."""
    shift = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        kept = min(i + 1, max(LEAST, math.ceil(DENSITY * (i + 1))))
        for j in range(SINK, i + 1 - (kept - SINK)):
            shift[i, j] = math.log(attenuation)
    return shift


def by_definition(make, model, sample, grid: SpanGrid, attenuation: float, estimator: str) -> np.ndarray:
    """[L, HKV, positions, spans] from whole attention matrices."""
    n = len(sample.token_ids)
    shift = None if attenuation == 1.0 else shift_by_definition(n, attenuation)

    def loss() -> torch.Tensor:
        logits = model(torch.tensor([sample.token_ids]), use_cache=False).logits[0]
        return F.cross_entropy(logits[torch.tensor(sample.answer_positions) - 1], torch.tensor(sample.answer_ids))

    i, j = torch.arange(n)[:, None], torch.arange(n)
    bucket = np.searchsorted(grid.position_edges, np.arange(n), side="right") - 1
    layers = []
    for p, g in make.captured(model, loss, shift):
        total = np.zeros((2, len(grid.position_edges) - 1, len(grid.spans_tokens)))
        for s, span in enumerate(grid.spans_tokens):
            keep = (j <= i) & ((j < SINK) | (j >= i + 1 - (span - SINK)))
            if estimator == "moa":
                rows = torch.where((j <= i) & ~keep, single_key_effects(p, g).abs(), 0).sum(-1)
            else:
                rows = masked_row_loss(p, g, keep)
                rows = rows.abs() if estimator == "rows" else rows
            per_head = rows[0].view(2, 2, n).sum(1).numpy()  # [HKV, N]
            for row in range(n):
                total[:, min(bucket[row], total.shape[1] - 1), s] += per_head[:, row]
        layers.append(np.abs(total))
    return np.stack(layers)


@pytest.mark.parametrize("attenuation", [1.0, 0.05])
@pytest.mark.parametrize("estimator", ["joint", "rows", "moa"])
@pytest.mark.parametrize(("tile_rows", "tile_keys"), [(1, 7), (26, 16), (512, 256)])
def test_a_models_losses_are_those_of_the_definition(
    make, monkeypatch, attenuation, estimator, tile_rows, tile_keys
) -> None:
    monkeypatch.setattr(torch_sweep, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(torch_sweep, "TILE_KEYS", tile_keys)
    model, n = make.model(), 53
    samples = [make.sample(n, 3, seed) for seed in (1, 2)]
    settings = InfluenceSettings(estimator, (attenuation,), DENSITY, weighting="text")
    got = profile_length(model, samples, n, SINK, LEAST, settings)
    want = np.mean([by_definition(make, model, s, got.grid, attenuation, estimator) for s in samples], axis=0)
    assert got.losses.shape == want.shape == (2, 2, 32, len(got.grid.spans_tokens))
    assert want.max() > 1e-3
    # answers' logits are taken in float32
    np.testing.assert_allclose(got.losses, want, rtol=2e-4, atol=1e-6 * want.max())
    assert (got.losses[..., -1] == 0).all()


def test_first_order_is_what_masking_a_little_does(make) -> None:
    """Scores of masked keys shifted by log(1 - e) move P towards P' at the rate of the kept mass: finite differences."""
    model, n, layer, head, step = make.model(), 31, 1, 2, 0.02
    sample = make.sample(n, 2)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    keep = (j <= i) & ((j < SINK) | (j >= i + 1 - (LEAST - SINK)))

    def loss_at(e: float) -> tuple[float, list]:
        shifts = torch.zeros(2, 1, 4, n, n, dtype=torch.float64)
        shifts[layer, 0, head] = torch.where(keep, 0.0, math.log(1 - e))
        losses = []

        def loss() -> torch.Tensor:
            logits = model(torch.tensor([sample.token_ids]), use_cache=False).logits[0]
            chosen = logits[torch.tensor(sample.answer_positions) - 1]
            losses.append(F.cross_entropy(chosen, torch.tensor(sample.answer_ids)))
            return losses[0]

        rows = make.captured(model, loss, shifts)
        return losses[0].item(), rows

    p, g = (x[0, head] for x in loss_at(0.0)[1][layer])
    kept_mass = torch.where(keep, p, 0).sum(-1)
    predicted = (masked_row_loss(p, g, keep) * kept_mass).sum().item()
    assert abs(predicted) > 1e-4
    assert (loss_at(step)[0] - loss_at(-step)[0]) / (2 * step) == pytest.approx(
        predicted, rel=0.01
    )  # norms are float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_models_are_profiled_in_float32(make, dtype) -> None:
    n = 40
    model = make.model(dtype=torch.float32)
    settings = InfluenceSettings("joint", (0.05,), DENSITY)
    want = profile_length(model, [make.sample(n)], n, SINK, LEAST, settings).losses.sum((2, 3))
    got = profile_length(model.to(dtype), [make.sample(n)], n, SINK, LEAST, settings).losses.sum((2, 3))
    np.testing.assert_allclose(got, want, rtol=0.25)


def state(model) -> list:
    return [
        model.config._attn_implementation,
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [p.grad is None for p in model.parameters()],
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(make, fails) -> None:
    model, n = make.model(), 20
    model.train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    before = state(model)
    weights = [p.clone() for p in model.parameters()]

    def stop(done: int) -> None:
        if fails:
            raise ZeroDivisionError

    try:
        profile_length(model, [make.sample(n)], n, SINK, LEAST, InfluenceSettings(), stop)
    except ZeroDivisionError:
        assert fails
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, **HEADS, attn_logit_softcapping=2.0, query_pre_attn_scalar=4, sliding_window=8),
        MistralConfig(**SIZES, **HEADS, sliding_window=8),
        GptOssConfig(**SIZES, **HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_softcaps_sinks_and_windows_are_those_of_eager_attention(make, config) -> None:
    n = 40
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    tokens, results = torch.tensor([make.sample(n, 0).token_ids]), []
    for name in ("eager", attention.NAME):
        attention.register()
        model.set_attn_implementation(name)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        with probing(probe(n)):
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            logits.square().mean().backward()
        results.append([logits, embedded.grad])
        model.zero_grad(set_to_none=True)
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_windows_cap_what_spans_lose(make) -> None:
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, **HEADS, sliding_window=8)).eval()
    got = profile_length(model, [make.sample(40)], 40, SINK, LEAST, InfluenceSettings())
    wide = [span - SINK >= 8 for span in got.grid.spans_tokens]
    assert got.losses[..., 0].max() > 0
    assert not got.losses[..., wide].any()


def test_a_window_that_covers_the_text_is_no_window(make) -> None:
    losses = []
    for window in (64, None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, **HEADS, sliding_window=window)).eval()
        losses.append(profile_length(model, [make.sample(40)], 40, SINK, LEAST, InfluenceSettings()).losses)
    np.testing.assert_array_equal(*losses)
    assert losses[0].max() > 0


def test_what_cannot_be_profiled_says_why(make) -> None:
    model = make.model()
    tokens = torch.tensor([make.sample(20).token_ids])
    attention.register()
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ModelError, match="outside of a profiling pass"):
        model(tokens, use_cache=False)
    padded = torch.ones_like(tokens)
    padded[:, :3] = 0
    with probing(probe(20)), pytest.raises(ModelError, match="unpadded"):
        model(tokens, attention_mask=padded, use_cache=False)


def test_weights_that_are_no_numbers_are_refused(make) -> None:
    model = make.model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        profile_length(model, [make.sample(20)], 20, SINK, LEAST, InfluenceSettings())


def test_the_margin_is_the_log_odds_against_all_else() -> None:
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(5, 11, dtype=torch.float64), torch.tensor([0, 3, 3, 10, 7])
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(objective_of(logits, labels, "margin"), ((1 - p) / p).log())
    torch.testing.assert_close(objective_of(logits, labels, "cross_entropy"), -p.log())


def test_the_margin_of_a_sure_answer_does_not_vanish() -> None:
    logits = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(objective_of(logits, torch.tensor([0]), "margin").sum(), logits)
    assert slope[0, 0].item() == -1


def test_weighted_answers_count_by_their_number(make) -> None:
    model, samples = make.model(), [make.sample(30, 1, 1), make.sample(30, 4, 2)]
    one, four = (
        profile_length(model, [s], 30, SINK, LEAST, InfluenceSettings(weighting="text")).losses for s in samples
    )
    weighted = profile_length(model, samples, 30, SINK, LEAST, InfluenceSettings()).losses
    np.testing.assert_allclose(weighted, (one + 4 * four) / 2, rtol=1e-9)


def test_signs_cancel_within_a_text_and_not_between_texts(make) -> None:
    model, samples = make.model(), [make.sample(40, 3, seed) for seed in (1, 2)]
    alone = [profile_length(model, [s], 40, SINK, LEAST, InfluenceSettings()).losses for s in samples]
    both = profile_length(model, samples, 40, SINK, LEAST, InfluenceSettings()).losses
    rows = profile_length(model, samples, 40, SINK, LEAST, InfluenceSettings("rows")).losses
    np.testing.assert_allclose(both, np.mean(alone, axis=0), rtol=1e-9)
    assert (both <= rows * (1 + 1e-9)).all()
    assert both.sum() < 0.99 * rows.sum()


def test_a_plan_can_be_the_reference(make) -> None:
    """Attenuating what a plan drops: nothing where it is dense, and what a uniform rule gives where it is uniform."""
    model, sample = make.model(), make.sample(40)
    attenuated = InfluenceSettings("joint", (0.05,), DENSITY)

    def profiled(settings: InfluenceSettings, *rules: ElasticRule) -> np.ndarray:
        plan = None
        if rules:
            alpha, beta = np.array([[r.alpha for r in rules]] * 2), np.array([[r.beta_fixed for r in rules]] * 2)
            plan = SpanRules(alpha, beta, SINK, LEAST)
        return profile_length(model, [sample], 40, SINK, LEAST, settings, reference=plan).losses

    uniform, dense = ElasticRule(0, DENSITY), ElasticRule(0, 1.0)
    np.testing.assert_array_equal(profiled(attenuated, uniform, uniform), profiled(attenuated))
    np.testing.assert_allclose(profiled(attenuated, dense, dense), profiled(InfluenceSettings()), rtol=1e-9)
    mixed = profiled(attenuated, uniform, dense)
    assert not np.allclose(mixed, profiled(attenuated))
    assert not np.allclose(mixed, profiled(InfluenceSettings()))
