"""A press's prompt is what it keeps, answers see no more than that, and nothing of it stays."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa.errors import MoaError, ModelError, UsageError
from moa.eval.compressed import Answering
from moa.integrations.presses import INSTALL, PressedModel, load_kvpress

PROMPT, ANSWER = 150, 7
needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason=f"kvpress is not installed; {INSTALL}")


class KeepsSome:
    """A press of kvpress' protocol: every head of every layer keeps keys of its own, given as bool [L, HKV, n]."""

    compression_ratio = 0.0

    def __init__(self, kept):
        self.kept, self.prompts = kept, 0

    def post_init_from_model(self, model):
        pass

    @contextmanager
    def __call__(self, model):
        hooks = []
        try:
            for layer in model.model.layers:
                layer.self_attn.rotary_emb = model.model.rotary_emb
                hooks.append(layer.self_attn.register_forward_hook(self.hook, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def hook(self, module, args, kwargs, output):
        if kwargs["cache_position"][-1] + 1 != kwargs["hidden_states"].shape[1]:
            return output
        self.prompts += 1
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for name in ("keys", "values"):
            heads = getattr(layer, name)[0]
            kept = self.kept[module.layer_idx]
            setattr(layer, name, torch.stack([head[k] for head, k in zip(heads, kept, strict=True)])[None])
        return output


def some(per_layer):
    """Keys kept, bool [L, HKV, n - 1] for a prompt of n: another choice for every head, as many for a layer's heads."""
    chosen = torch.Generator().manual_seed(2)
    kept = torch.zeros(3, 2, PROMPT - 1, dtype=torch.bool)
    for layer, count in enumerate(per_layer):
        for head in range(2):
            kept[layer, head, torch.randperm(PROMPT - 1, generator=chosen)[:count]] = True
    return kept


@pytest.mark.parametrize("per_layer", [(40, 40, 40), (60, 40, 20), (1, 1, 1)])
def test_answers_see_what_was_kept_and_no_more(model, ids, masked, per_layer):
    kept = some(per_layer)
    wanted = masked(ids, kept, PROMPT - 1)[PROMPT - 1 : -1]
    press = KeepsSome(kept)
    with PressedModel(model, press) as pressed:
        found = []
        prompt, answer = ids[0, :PROMPT].tolist(), ids[0, PROMPT:].tolist()
        answering = Answering(model, lambda x: found.append(pressed.prefill(x, 0.5)) or found[0], prompt)
        assert (found[0].held, found[0].hidden) == (2 * sum(per_layer), False)
        assert found[0].one_by_one == (len({*per_layer}) > 1)
        assert torch.allclose(answering.logits(answer), wanted, atol=2e-4)
        assert press.prompts == 3, "once per layer: an answer is no prompt"
        greedy = Answering(model, lambda x: pressed.prefill(x, 0.5), prompt).greedy(ANSWER, lambda answer: False)
    text = ids[:, :PROMPT]
    for token in greedy:  # written again, from the whole text each time
        assert int(masked(text, kept, PROMPT - 1)[-1].argmax()) == token
        text = torch.cat([text, torch.tensor([[token]])], dim=1)


def test_nothing_is_pressed_at_ratio_zero(model, ids):
    with PressedModel(model, KeepsSome(None)) as pressed, torch.no_grad():
        found = pressed.prefill(ids, 0.0)
        assert found.held == 3 * 2 * ids.shape[1]


def state(model):
    modules = [layer.self_attn for layer in model.model.layers]
    return [
        (sorted(vars(m)), [name for name, _ in m.named_children()], len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in modules
    ]


def test_nothing_stays(model, ids):
    before, functions = state(model), dict(ALL_ATTENTION_FUNCTIONS.items())
    with PressedModel(model, KeepsSome(some((9, 9, 9))), eager=True) as pressed:
        pressed.prefill(ids[:, : PROMPT - 1], 0.5)
        assert model.config._attn_implementation == "sdpa"
    assert state(model) == before
    with pytest.raises(TypeError), PressedModel(model, KeepsSome(None)) as pressed:
        pressed.prefill(ids, 0.5)  # there is nothing to keep
    assert state(model) == before
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == functions


def test_what_a_press_refuses_is_said(model, ids):
    class Refuses(KeepsSome):
        def hook(self, module, args, kwargs, output):
            raise AssertionError("longer than the window")

    with PressedModel(model, Refuses(None), eager=True) as pressed:
        with pytest.raises(UsageError, match="Refuses refuses: longer than the window"):
            pressed.prefill(ids, 0.5)
        assert model.config._attn_implementation == "sdpa"


def test_models_that_presses_cannot_attach_to_are_refused():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    windowed = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8, pad_token_id=0)
    with pytest.raises(ModelError, match="sliding windows"):
        PressedModel(AutoModelForCausalLM.from_config(windowed), KeepsSome(None))
    with pytest.raises(ModelError, match="self_attn"):
        PressedModel(torch.nn.Linear(1, 1), KeepsSome(None))


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is installed")
def test_without_kvpress_it_says_how_to_get_it():
    with pytest.raises(MoaError, match="pip install --no-deps kvpress"):
        load_kvpress()


@needs_kvpress
def test_importing_kvpress_leaves_attention_alone():
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    load_kvpress()
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == functions


KEEPING = ["SnapKVPress", "ObservedAttentionPress", "KnormPress", "TOVAPress", "StreamingLLMPress", "PyramidKVPress"]


@needs_kvpress
@pytest.mark.parametrize("name", KEEPING)
def test_answers_under_kvpress_see_the_keys_that_it_kept(model, ids, masked, name):
    press, eager = getattr(load_kvpress(), name)(), name == "ObservedAttentionPress"
    if hasattr(press, "window_size"):
        press.window_size = 8
    before = state(model)
    dense = DynamicCache()
    with torch.no_grad():
        model(ids[:, : PROMPT - 1], past_key_values=dense)
    with PressedModel(model, press, eager=eager) as pressed:
        found = []
        prompt, answer = ids[0, :PROMPT].tolist(), ids[0, PROMPT:].tolist()
        answering = Answering(model, lambda x: found.append(pressed.prefill(x, 0.7)) or found[0], prompt)
        kept = [
            torch.stack(
                [(a[:, None] - b[None]).abs().amax(-1).amin(1) < 1e-5 for a, b in zip(all_, some_, strict=True)]
            )
            for all_, some_ in (
                (d.keys[0], c.keys[0]) for d, c in zip(dense.layers, found[0].cache.layers, strict=True)
            )
        ]  # [L][HKV, n]: keys of the dense cache that are still there
        assert sum(int(layer.sum()) for layer in kept) == found[0].held
        assert found[0].held == pytest.approx(0.3 * 6 * (PROMPT - 1), rel=0.03)
        logits = answering.logits(answer)
    assert torch.allclose(logits, masked(ids, kept, PROMPT - 1)[PROMPT - 1 : -1], atol=2e-4)
    assert state(model) == before


@needs_kvpress
def test_presses_that_hide_keys_save_no_memory(model, ids):
    kvpress = load_kvpress()
    before, functions = state(model), dict(ALL_ATTENTION_FUNCTIONS.items())
    with PressedModel(model, kvpress.AdaKVPress(kvpress.KnormPress())) as pressed:
        for n in (PROMPT, PROMPT - 9):  # the second prompt's own
            found = pressed.prefill(ids[:, :n], 0.5)
            assert found.hidden
            assert found.one_by_one
            assert found.held == pytest.approx(0.5 * 6 * n, abs=6)
            assert found.cache.get_seq_length() == n
        dense = pressed.prefill(ids, 0.0)
        assert (dense.held, dense.hidden) == (6 * ids.shape[1], False)
    assert (state(model), dict(ALL_ATTENTION_FUNCTIONS.items())) == (before, functions)
