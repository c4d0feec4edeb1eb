"""Measured effects of single heads, and how predictions are held against them."""

from __future__ import annotations

import numpy as np
import pytest

from moa.errors import UsageError
from moa.eval.fidelity import Effects, fidelity, measure_effects, shortened, text_losses
from moa.eval.scoring import answer_loss
from moa.hf.apply import apply
from moa.hf.shape import model_shape
from moa.profile.artefact import LengthProfile
from moa.profile.sweep import SpanGrid
from moa.profile.synthetic import synthetic_samples
from moa.spans import ElasticRule

N = 128


@pytest.fixture(scope="module")
def texts(tokenizer):
    return synthetic_samples(tokenizer, N, 3, 0)


def test_an_effect_is_the_loss_of_that_plan_less_the_dense_one(model, texts):
    shape = model_shape(model, "tiny")
    effects = measure_effects(model, shape, texts, (16, N), 8, 16)
    changes = []
    for text in texts:
        with apply(model, shortened(shape, [(1, 0)], ElasticRule(16, 0.0), 8, 16)):
            sparse = answer_loss(model, [text])
        changes.append(sparse - answer_loss(model, [text]))
    assert effects.mean.shape == effects.error.shape == (2, 2, 2)
    assert effects.mean[1, 0, 0] == pytest.approx(np.mean(changes), rel=1e-4)
    assert effects.error[1, 0, 0] == pytest.approx(np.std(changes, ddof=1) / np.sqrt(3), rel=1e-4)
    np.testing.assert_allclose(effects.mean[..., 1], 0, atol=1e-6)  # a span of everything changes nothing
    assert np.abs(effects.mean[..., 0]).max() > 1e-5


def test_texts_count_alike_whatever_their_answers(model, texts):
    losses = text_losses(model, texts, None)
    assert losses == pytest.approx([answer_loss(model, [text]) for text in texts], rel=1e-6)


def test_one_text_has_no_error(model, texts):
    with pytest.raises(UsageError, match="at least 2 texts"):
        measure_effects(model, model_shape(model, "tiny"), texts[:1], (16,), 8, 16)


def profile_of(losses: np.ndarray) -> LengthProfile:
    """One layer of one-bucket losses [HKV, S] at spans 16, 32 and N."""
    return LengthProfile(N, SpanGrid((16, 32, N), (0, N), 8), losses[None, :, None, :])


def test_ranks_count_above_the_noise_alone():
    mean = np.array([[[3.0, -2.0], [1.0, 1e-3], [0.5, -1e-3]]])  # [1, 3, 2]
    effects = Effects((16, 32), mean, np.full_like(mean, 0.1))
    assert effects.above_noise.sum() == 4
    predicted = np.zeros((3, 3))
    predicted[:, :2] = [[30.0, 20.0], [10.0, 999.0], [5.0, 999.0]]
    found = fidelity(effects, profile_of(predicted), 16)
    assert (found.effects, found.above_noise) == (6, 4)
    assert found.spearman == pytest.approx(1.0)
    assert found.top_quarter == 1.0
    upside_down = fidelity(effects, profile_of(1000 - predicted), 16)
    assert upside_down.spearman == pytest.approx(-1.0)
    assert upside_down.top_quarter == 0.0
