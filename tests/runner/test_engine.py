"""What an engine takes, refuses and tells, and that it leaves a model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from moa.demo.tokenizer import build_tokenizer
from moa.errors import ModelError, ResourceError, UsageError
from moa.hf import apply
from moa.runner.engine import Engine
from moa.runner.packed import PackedModel
from moa.runner.request import FinishReason, QueueFullError, SamplingParams
from moa.runner.settings import EngineSettings
from moa.runner.trial import check_packs


def test_a_model_is_left_as_it_was(model, plan) -> None:
    text = torch.tensor([[5, 6, 7]])
    before, attention = model(text).logits, model.config._attn_implementation
    with Engine(model, plan) as engine:
        with pytest.raises(ModelError, match="runs in an engine; close the engine"):
            model(text)
        with pytest.raises(ModelError, match="in an engine already"):
            Engine(model)
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert model.config._attn_implementation == attention
    assert torch.equal(model(text).logits, before)
    with apply(model, plan), pytest.raises(ModelError, match="runs under a plan or in an engine already"):
        Engine(model)
    with pytest.raises(UsageError, match="no policy"):
        Engine(model, settings=EngineSettings(policy="best"))
    assert torch.equal(model(text).logits, before)


def test_a_prompt_has_logprobs_of_its_own(make_engine, alone, texts) -> None:
    text = texts[-1]
    logits = alone[False].model(torch.tensor([text])).logits[0].log_softmax(-1)
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    for chunk in (1, 64, None):
        for _ in range(2):  # the prefix cache must not swallow any
            (done,) = make_engine(False, chunk_tokens=chunk).generate([text], params)
            assert (done.tokens, done.finish) == ((), FinishReason.LENGTH)
            assert [row.token for row in done.prompt_logprobs] == list(text[1:])
            got = torch.tensor([row.logprob for row in done.prompt_logprobs])
            torch.testing.assert_close(got, logits[range(len(text) - 1), list(text[1:])], atol=1e-4, rtol=0)
            tops = [[token for token, _ in row.top] for row in done.prompt_logprobs]
            assert tops == logits[:-1].topk(2).indices.tolist()


def test_preemption_repeats_no_prompt_logprobs(make_engine, run, texts, token_bytes) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    small = make_engine(True, kv_bytes=260 * token_bytes, token_budget=64)
    done = run(small, {i: [(str(i), text, params)] for i, text in enumerate(texts)})
    assert small.stats.preemptions
    assert all(len(done[str(i)].prompt_logprobs) == len(text) - 1 for i, text in enumerate(texts))


def test_drawn_tokens_depend_on_the_seed_alone(make_engine, run, texts, token_bytes) -> None:
    params = [
        SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.2, top_p=0.95, seed=i, n=2) for i in range(22)
    ]
    want = {}
    for i, text in enumerate(texts):
        for j, done in enumerate(make_engine(True).generate([text], params[i])):
            want[f"{i}/{j}"] = done.tokens
    engine = make_engine(True, kv_bytes=300 * token_bytes, token_budget=50, policy="prefill-first")
    got = run(engine, {i: [(str(i), text, params[i])] for i, text in enumerate(texts)})
    assert engine.stats.preemptions
    assert {name: done.tokens for name, done in got.items()} == want
    assert len(set(want.values())) > 40


def test_the_models_own_end_and_others_end_a_text(make_engine, model, texts, alone, monkeypatch) -> None:
    tokens, _ = alone[True].say(texts[3])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokens[5], 127])
    at = tokens.index(tokens[5])
    engine = make_engine(True)
    (done,) = engine.generate([texts[3]], SamplingParams(max_tokens=24))
    assert (done.finish, list(done.tokens)) == (FinishReason.STOP, tokens[: at + 1])
    (done,) = engine.generate([texts[3]], SamplingParams(max_tokens=24, ignore_eos=True))
    assert (done.finish, list(done.tokens)) == (FinishReason.LENGTH, tokens)
    (done,) = engine.generate([texts[3]], SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=(tokens[9],)))
    assert (done.finish, list(done.tokens)) == (FinishReason.STOP, tokens[: tokens.index(tokens[9]) + 1])


def test_stop_strings_cut_the_text(model, plan, texts, alone) -> None:
    tokenizer: PreTrainedTokenizerFast = build_tokenizer()
    tokens, _ = alone[True].say(texts[5])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    with Engine(model, plan, tokenizer=tokenizer) as engine:
        (done,) = engine.generate([texts[5]], SamplingParams(max_tokens=24, ignore_eos=True))
        assert done.text.strip() == whole.strip()
        stop = done.text[4:7]
        (cut,) = engine.generate([texts[5]], SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop,)))
        assert cut.finish is FinishReason.STOP
        assert cut.text == done.text[: done.text.index(stop)]
        assert list(cut.tokens) == tokens[: len(cut.tokens)]


@pytest.mark.parametrize(
    ("prompt", "params", "error", "match"),
    [
        ([], {}, UsageError, "at least 1 token"),
        ([128], {}, UsageError, "from 0 to 127"),
        ([-1], {}, UsageError, "from 0 to 127"),
        ([True], {}, UsageError, "from 0 to 127"),
        ([1], {"stop": ("x",)}, UsageError, "stop strings need a tokenizer"),
        ([1], {"logit_bias": {128: 1.0}}, UsageError, "logit_bias names a token above 127"),
        ([1] * 1000, {"max_tokens": 25}, ResourceError, "1000 tokens and up to 25 more .* context of 1024"),
        ([1] * 200, {"max_tokens": 102}, ResourceError, "a prompt of 200 tokens that may grow to 301 can need"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(make_engine, token_bytes, prompt, params, error, match) -> None:
    engine = make_engine(False, kv_bytes=300 * token_bytes * 100 // 97 + 1)
    with pytest.raises(error, match=match):
        engine.add(prompt, SamplingParams(**params))
    with pytest.raises(error, match=match):
        engine.generate([[1, 2], prompt], [SamplingParams(max_tokens=3), SamplingParams(**params)])
    assert engine.is_idle
    (done,) = engine.generate([[1] * 200], SamplingParams(max_tokens=101, ignore_eos=True))  # just fits
    assert len(done.tokens) == 101


def test_a_full_queue_refuses_and_generate_waits(make_engine, texts, greedy) -> None:
    engine = make_engine(True, max_waiting=2)
    assert len(engine.generate(texts[:7], greedy)) == 7
    for name in "ab":
        engine.add(texts[0], greedy, name)
    with pytest.raises(QueueFullError, match="2 requests wait, at most 2 may"):
        engine.add(texts[0], greedy)
    with pytest.raises(UsageError, match="nothing else to do"):
        engine.generate(texts[:1], greedy)
    assert engine.cancel("a")
    assert not engine.cancel("a")
    assert not engine.cancel("nobody")
    engine.add(texts[0], greedy)
    while not engine.is_idle:
        engine.step()
    with pytest.raises(UsageError, match="n is 3, and at most 2 requests may wait"):
        engine.add(texts[0], SamplingParams(n=3))


def test_a_text_that_cannot_be_made_ends_its_request_alone(model, plan, texts, alone, monkeypatch) -> None:
    with Engine(model, plan, tokenizer=build_tokenizer()) as engine:
        names = [engine.add(text, SamplingParams(max_tokens=24, ignore_eos=True)) for text in texts[:3]]
        broken = engine._live[names[1]][0]
        add, count = broken.text.add, iter(range(100))
        monkeypatch.setattr(broken.text, "add", lambda token: add(token) if next(count) < 5 else 1 / 0)
        told = {name: [] for name in names}
        while not engine.is_idle:
            for update in engine.step():
                told[update.name].append(update)
        assert [told[name][-1].finish for name in names] == ["length", "error", "length"]
        assert told[names[1]][-1].error == "its tokens could not be made text: ZeroDivisionError: division by zero"
        for name, text in zip(names[::2], texts[:3:2], strict=True):
            assert [token for update in told[name] for token in update.tokens] == alone[True].say(text)[0]
        assert engine.stats.output_tokens == 24 + 5 + 24


def test_steps_that_fail_are_counted_and_told_as_others(make_engine, texts, greedy, monkeypatch) -> None:
    engine = make_engine(True, kv_bytes=1 << 20)
    for text in texts[:2]:
        engine.add(text, greedy)
    engine.step()
    monkeypatch.setattr(engine.packed, "forward", lambda *given: 1 / 0)
    assert {update.finish for update in engine.step()} == {FinishReason.ERROR}
    assert (engine.stats.failed_steps, engine.stats.steps) == (1, 2)
    assert engine.stats.last.running == 0
    assert engine.stats.last.kv_usage_ratio == 0
    assert engine.is_idle


def test_memory_too_small_for_a_token_is_said(make_engine) -> None:
    with pytest.raises(ResourceError, match="500 bytes of KV memory hold no token: one takes 512"):
        make_engine(False, kv_bytes=500)


def test_other_classes_run_packed_or_say_why_not(model) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, attn_implementation="sdpa")).eval()
    check_packs(neox)
    with Engine(neox) as engine:
        (done,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True))
    want = neox.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(done.tokens) == want[0, 3:].tolist()


def test_a_model_that_looks_beside_a_token_is_refused(model, monkeypatch) -> None:
    """A layer that mixes neighbours, as convolutions do, must not be let through."""
    forward = type(model.model.layers[0].mlp).forward
    monkeypatch.setattr(
        type(model.model.layers[0].mlp), "forward", lambda self, x: forward(self, x + x.roll(1, 1)), raising=True
    )
    with pytest.raises(ModelError, match=r"cannot run packed: .* differ from each alone by"):
        check_packs(model)
    assert not isinstance(model.config._attn_implementation, PackedModel)
