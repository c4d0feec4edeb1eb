"""A profile survives its file byte for byte, refuses other files, and prices rules by what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import ProfileError
from moa.plan import Calibration, ModelShape
from moa.profile.artefact import LengthProfile, Profile
from moa.profile.sweep import SpanGrid
from moa.spans import ElasticRule, span

SINK, LEAST = 4, 16


def at_length(n: int, seed: int = 0, layers: int = 2, kv_heads: int = 2) -> LengthProfile:
    """Losses that fall with the span and are zero where it covers a bucket, as measured ones."""
    grid = SpanGrid.for_length(n, SINK, LEAST)
    rng = np.random.default_rng(seed)
    size = (layers, kv_heads, len(grid.position_edges) - 1, len(grid.spans_tokens))
    losses = np.sort(rng.lognormal(0, 2, size), axis=-1)[..., ::-1].copy()
    last_row = np.array(grid.position_edges[1:])[:, None]
    losses[..., np.array(grid.spans_tokens) >= last_row] = 0
    return LengthProfile(n, grid, losses, ("torch", "triton"))


def make_profile(*lengths: int) -> Profile:
    model = ModelShape(architecture="Tiny", layers=2, heads=4, kv_heads=2, head_dim=8, fingerprint="f")
    calibration = Calibration(
        dataset="synthetic", dataset_sha256="0", samples_per_length=2, lengths_tokens=lengths, seed=0,
        estimator="joint", supervision="model",
    )  # fmt: skip
    return Profile(model, calibration, SINK, LEAST, tuple(at_length(n, n) for n in lengths))


def test_round_trip(tmp_path: Path) -> None:
    profile = make_profile(128, 257)
    profile.save(tmp_path / "a")
    loaded = Profile.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    profile.save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert (loaded.model, loaded.calibration) == (profile.model, profile.calibration)
    assert (loaded.sink_tokens, loaded.min_span_tokens) == (SINK, LEAST)
    for got, want in zip(loaded.lengths, profile.lengths, strict=True):
        assert (got.n_tokens, got.grid, got.backends) == (want.n_tokens, want.grid, want.backends)
        assert np.array_equal(got.losses, want.losses)


def test_a_profile_of_before_still_loads(tmp_path: Path) -> None:
    make_profile(128).save(tmp_path / "new")
    with safetensors.safe_open(tmp_path / "new", "numpy") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "backends"}
        safetensors.numpy.save_file({"losses.128": file.get_tensor("losses.128")}, tmp_path / "old", metadata)
    old = Profile.load(tmp_path / "old").lengths[0]
    assert old.backends == ()
    assert np.array_equal(old.losses, make_profile(128).lengths[0].losses)


@given(cut=st.floats(0, 1, exclude_max=True), flip=st.none() | st.integers(1, 255))
def test_damaged_files_are_refused(tmp_path_factory, cut, flip) -> None:
    """A flip inside a number of the tensor is another profile, so only the header is flipped."""
    folder = tmp_path_factory.mktemp("damaged")
    make_profile(128).save(folder / "p")
    data = bytearray((folder / "p").read_bytes())
    if flip is None:
        data = data[: int(cut * len(data))]
    else:
        data[int(cut * 8)] ^= flip  # the header's length
    (folder / "p").write_bytes(bytes(data))
    with pytest.raises(ProfileError, match=r"profile again"):
        Profile.load(folder / "p")


def test_other_files_are_refused(tmp_path: Path) -> None:
    good = make_profile(128)
    good.save(tmp_path / "good")
    with safetensors.safe_open(tmp_path / "good", "numpy") as file:
        meta, losses = file.metadata(), file.get_tensor("losses.128")

    def refused(tensors: dict, **changes: str | None) -> None:
        kept = {k: v for k, v in {**meta, **changes}.items() if v is not None}
        (tmp_path / "x").write_bytes(safetensors.numpy.save(tensors, kept))
        with pytest.raises(ProfileError, match=r"x: .*profile again"):
            Profile.load(tmp_path / "x")

    for name in meta:
        if name != "backends":  # profiles of before have none
            refused({"losses.128": losses}, **{name: None})
        refused({"losses.128": losses}, **{name: "?"})
        refused({"losses.128": losses}, **{name: "[" * 100_000})
    refused({"other": losses})
    refused({"losses.128": losses[:, :, :-1].copy()})
    refused({"losses.128": losses[:1].copy()})
    refused({"losses.128": losses.astype(np.float32)})
    refused({"losses.128": losses}, lengths="[[128, [16], [0, 128]]]")
    refused({"losses.128": losses}, schema_version="2")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ProfileError):
            Profile.load(path)
    (tmp_path / "x").write_text("{}")
    with pytest.raises(ProfileError):
        Profile.load(tmp_path / "x")


def middles(at: LengthProfile) -> np.ndarray:
    edges = np.array(at.grid.position_edges)
    return (edges[:-1] + edges[1:] + 1) // 2


@pytest.mark.parametrize("n", [64, 128, 257, 1000])
@pytest.mark.parametrize("mode", ["running", "pinned"])
def test_a_dense_rule_costs_nothing(n, mode) -> None:
    at = at_length(n)
    for rule in (ElasticRule(0, 1.0), ElasticRule(n, 0.0), ElasticRule(5, 1.0)):
        assert (at.rule_loss(rule, LEAST, mode) == 0).all()


@pytest.mark.parametrize("n", [128, 257, 1000])
def test_fixed_rules_at_sampled_spans_cost_what_was_measured(n) -> None:
    at = at_length(n)
    ends = np.array(at.grid.position_edges)[1:]
    for i, tokens in enumerate(at.grid.spans_tokens):
        pinned = at.rule_loss(ElasticRule(tokens, 0.0), LEAST, "pinned")
        want = 0 if tokens == n else at.losses[..., i].sum(-1)
        np.testing.assert_allclose(pinned, want, rtol=1e-12)
        running = at.rule_loss(ElasticRule(tokens, 0.0), LEAST)
        np.testing.assert_allclose(running, at.losses[..., ends > tokens, i].sum(-1), rtol=1e-12)


@given(n=st.sampled_from([128, 257, 1000]), tokens=st.integers(1, 1100), more=st.integers(0, 300))
def test_a_longer_span_never_costs_more(n, tokens, more) -> None:
    at = at_length(n)
    for mode in ("running", "pinned"):
        less = at.rule_loss(ElasticRule(tokens, 0.0), LEAST, mode)
        assert (at.rule_loss(ElasticRule(tokens + more, 0.0), LEAST, mode) <= less + 1e-9).all()


@given(alpha=st.integers(-400, 400), beta=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_rule_costs_the_interpolated_loss_of_each_bucket(alpha, beta, seed) -> None:
    n, rule = 257, ElasticRule(alpha, beta)
    at = at_length(n, seed)
    for mode in ("running", "pinned"):
        want = np.zeros((2, 2))
        for b, middle in enumerate(middles(at)):
            length = int(middle) if mode == "running" else n
            args = (np.array(x, dtype=np.int64) for x in (rule.alpha, rule.beta_fixed, length))
            kept = int(span(*args, LEAST))
            last = at.grid.position_edges[b + 1] if mode == "running" else n
            at_last = int(span(np.array(alpha), np.array(rule.beta_fixed), np.array(last), LEAST))
            if kept >= length:
                kept = at_last
            if at_last < last:
                for head in np.ndindex(2, 2):
                    want[head] += np.interp(kept, at.grid.spans_tokens, at.losses[(*head, b)])
        np.testing.assert_allclose(at.rule_loss(rule, LEAST, mode), want, rtol=1e-9, atol=1e-12)


def test_running_never_costs_less_than_pinned() -> None:
    """A running span is the shorter one at every row but the last."""
    at = at_length(1000)
    for beta in (0.1, 0.25, 0.5):
        rule = ElasticRule(0, beta)
        shorter, longer = at.rule_loss(rule, LEAST), at.rule_loss(rule, LEAST, "pinned")
        assert (shorter > longer).all()


def test_losses_of_many_rules_are_those_of_each() -> None:
    profile = make_profile(128, 257)
    rules = (ElasticRule(0, 1.0), ElasticRule(20, 0.0), ElasticRule(0, 0.25))
    got = profile.rule_losses(rules)
    assert got.shape == (2, 2, 2, 3)
    for i, at in enumerate(profile.lengths):
        for r, rule in enumerate(rules):
            assert np.array_equal(got[i, ..., r], at.rule_loss(rule, LEAST))


@pytest.mark.parametrize("n", [1, LEAST - 1, LEAST])
def test_a_length_within_the_least_span_costs_nothing(n) -> None:
    at = at_length(n)
    assert at.grid.spans_tokens == (n,)
    assert (at.rule_loss(ElasticRule(0, 0.1), LEAST) == 0).all()


RULES = (ElasticRule(32, 0.0), ElasticRule(0, 0.25), ElasticRule(-10, 0.5), ElasticRule(0, 1.0))


def test_a_length_between_two_profiled_ones_is_priced_by_both() -> None:
    profile = make_profile(128, 512)
    below, above = profile.lengths
    for n in (128, 512):
        assert np.array_equal(profile.rule_losses_at(n, RULES), profile.rule_losses(RULES)[n // 512])
    middle = np.stack(
        [
            (below.stretched(256).rule_loss(rule, LEAST) + above.stretched(256).rule_loss(rule, LEAST)) / 2
            for rule in RULES
        ],
        axis=-1,
    )
    np.testing.assert_allclose(profile.rule_losses_at(256, RULES), middle, rtol=1e-12)  # half way from 128 to 512
    near = np.stack([below.stretched(129).rule_loss(rule, LEAST) for rule in RULES], axis=-1)
    np.testing.assert_allclose(profile.rule_losses_at(129, RULES), near, rtol=0.05, atol=0.05 * near.max())
    assert (profile.rule_losses_at(256, RULES)[..., -1] == 0).all()  # a dense rule costs nothing anywhere


@pytest.mark.parametrize("order", [(128, 512), (512, 128)])
def test_a_length_outside_is_guessed_from_the_nearest(order) -> None:
    profile = make_profile(*order)
    at = {found.n_tokens: found for found in profile.lengths}
    for n, nearest in ((64, 128), (1024, 512)):
        want = np.stack([at[nearest].stretched(n).rule_loss(rule, LEAST) for rule in RULES], axis=-1)
        assert np.array_equal(profile.rule_losses_at(n, RULES), want)
        assert np.array_equal(profile.rule_losses(RULES, unseen_tokens=n)[-1], want)
