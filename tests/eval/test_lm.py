"""The model as lm-eval sees it: what HFLM says without a plan, what the plan says with one, cuts counted."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import moa
from moa import demo
from moa.errors import PlanError, UsageError
from moa.eval.lm import MoaLM
from moa.eval.recall import answer, recall_texts
from moa.eval.records import RecallTask
from moa.hf.shape import model_shape
from moa.plan import Plan

WORDS = "the old cart blocks the wheel . anna came to the mill . question : the code of bahul is 42 .".split()


def text(n_words, start=0):
    return " ".join(WORDS[(start + i * 7) % len(WORDS)] for i in range(n_words))


def requests(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = [
    (text(90), " " + text(3, 1)),
    (text(41, 2), " " + text(9, 3)),
    (text(40, 5), " 42"),
    ("", text(5)),
    (text(88), " 10"),
]


@pytest.fixture(scope="module")
def plan(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    rules = (((0, 0.25), (0, 1.0)), ((20, 0.0), (8, 0.5)))
    return Plan(model=model_shape(model), rules=rules, sink_tokens=4, min_span_tokens=16)


@pytest.fixture(scope="module")
def stock(tiny_folder):
    return HFLM(str(tiny_folder), device="cpu", batch_size=3)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_without_a_plan_it_says_what_stock_lm_eval_says(batch_size, tiny_folder, stock):
    ours = MoaLM(str(tiny_folder), batch_size=batch_size, max_batch_size=2, max_length=256)
    ask = requests("loglikelihood", *PAIRS)
    for (ll, greedy), (expected, wanted) in zip(ours.loglikelihood(ask), stock.loglikelihood(ask), strict=True):
        assert ll == pytest.approx(expected, abs=1e-4)
        assert greedy == wanted
    ask = requests(
        "generate_until", *[(context, {"max_gen_toks": 6, "until": ["mill"]}) for context, _ in PAIRS if context]
    )
    assert ours.generate_until(ask) == stock.generate_until(ask)


def test_rolling_windows_say_what_stock_lm_eval_says(tiny_folder):
    ask = requests("loglikelihood_rolling", (text(150),), (text(20, 3),))
    ours = MoaLM(str(tiny_folder), max_length=64, batch_size=2).loglikelihood_rolling(ask)
    stock = HFLM(str(tiny_folder), device="cpu", max_length=64, batch_size=2).loglikelihood_rolling(ask)
    assert ours == pytest.approx(stock, abs=1e-4)


def test_logits_are_made_for_the_scored_tokens_alone(tiny_folder):
    ours = MoaLM(str(tiny_folder), batch_size=1)
    seen = []
    ours.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[1]))
    ours.loglikelihood(requests("loglikelihood", (text(90), " " + text(3, 1))))
    assert seen == [3]


def test_a_dense_plan_says_what_stock_lm_eval_says(tiny_folder, stock):
    shape = model_shape(stock.model)
    ours = MoaLM(str(tiny_folder), plan=Plan.uniform(shape, 0, 1.0), batch_size=3)
    ask = requests("generate_until", *[(context, {"max_gen_toks": 6}) for context, _ in PAIRS if context])
    assert ours.generate_until(ask) == stock.generate_until(ask)


def by_hand(folder, plan):
    """A model under the plan by another backend, its tokenizer, and what generates from one text at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    moa.apply(model, plan, backend="reference")

    def write(context, count):
        ids = tokenizer(context, return_tensors="pt").input_ids
        greedy = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
        return tokenizer.decode(model.generate(ids, **greedy)[0, ids.shape[1] :], skip_special_tokens=True)

    return model, tokenizer, write


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": "auto", "max_batch_size": 2}])
def test_under_a_plan_it_writes_what_the_model_writes_by_hand(options, tiny_folder, plan, stock):
    ours = MoaLM(str(tiny_folder), plan=plan, **options)
    *_, write = by_hand(tiny_folder, plan)
    asked = [(context, {"max_gen_toks": 9, "until": ["mill"]}) for context, _ in PAIRS if context]
    found = ours.generate_until(requests("generate_until", *asked))
    assert found == [write(context, 9).split("mill")[0] for context, _ in asked]
    assert found != stock.generate_until(requests("generate_until", *asked))


@pytest.mark.parametrize("under", [False, True])
def test_prompts_in_chunks_give_the_same_answers(under, tiny_folder, plan):
    asked = requests("generate_until", *[(context, {"max_gen_toks": 5}) for context, _ in PAIRS if context])
    given = {"plan": plan if under else None, "batch_size": 3}
    whole = MoaLM(str(tiny_folder), **given).generate_until(asked)
    ours, steps = MoaLM(str(tiny_folder), prefill_chunk=32, **given), []
    ours.model.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert ours.generate_until(asked) == whole
    assert max(steps) == 32
    assert ours.get_model_info()["moa"]["prefill_chunk"] == 32
    for wrong in (0, "32", True):
        with pytest.raises(UsageError, match="prefill_chunk must be a whole number"):
            MoaLM(str(tiny_folder), prefill_chunk=wrong)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": "auto", "max_batch_size": 4}])
def test_under_a_plan_rolling_windows_are_the_models_by_hand(options, tiny_folder, plan):
    """Every token once, each in a window of 64 that ends with its chunk, as lm-eval cuts them."""
    model, tokenizer, _ = by_hand(tiny_folder, plan)
    texts, wanted = [text(150), text(20, 3), text(64, 1)], []
    for each in texts:
        ids, total = tokenizer(each)["input_ids"], 0.0
        before = [tokenizer.bos_token_id, *ids]  # what stands before each
        for start in range(0, len(ids), 64):
            new = torch.tensor(ids[start : start + 64])
            end = start + len(new)
            with torch.no_grad():
                logits = model(torch.tensor([before[max(0, end - 64) : end]]), use_cache=False).logits[0]  # [T, V]
            total += float(logits[-len(new) :].log_softmax(-1).gather(1, new[:, None]).sum())
        wanted.append(total)
    ask = requests("loglikelihood_rolling", *[(each,) for each in texts])
    ours = MoaLM(str(tiny_folder), plan=plan, max_length=64, **options).loglikelihood_rolling(ask)
    dense = MoaLM(str(tiny_folder), max_length=64).loglikelihood_rolling(ask)
    assert ours == pytest.approx(wanted, abs=1e-3)
    assert dense != pytest.approx(wanted, abs=1e-2)


def test_auto_tries_no_batch_on_a_cpu_unless_it_is_told_to(tiny_folder, monkeypatch):
    tried = []
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda self, *given: tried.append(self.max_batch_size) or 2)
    ask = requests("loglikelihood", *PAIRS)
    alone = MoaLM(str(tiny_folder), batch_size="auto").loglikelihood(ask)
    assert tried == []
    assert MoaLM(str(tiny_folder), batch_size="auto", max_batch_size=8).loglikelihood(ask) == [
        (pytest.approx(ll, abs=1e-4), greedy) for ll, greedy in alone
    ]
    assert tried == [8]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_under_a_plan_it_says_what_each_text_alone_gives(batch_size, tiny_folder, plan, stock):
    ours = MoaLM(str(tiny_folder), plan=plan, batch_size=batch_size)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), stock.tokenizer
    with moa.apply(model, plan, backend="reference"), torch.no_grad():
        for (context, continuation), (ll, _) in zip(
            PAIRS, ours.loglikelihood(requests("loglikelihood", *PAIRS)), strict=True
        ):
            if context:
                ids = tokenizer(context + continuation, return_tensors="pt").input_ids
                count = len(continuation.split())
                logits = model(ids, use_cache=False).logits[0, -count - 1 : -1].log_softmax(-1)  # [count, V]
                assert ll == pytest.approx(float(logits.gather(1, ids[0, -count:, None]).sum()), abs=1e-4)
    dense = stock.loglikelihood(requests("loglikelihood", *PAIRS))
    assert abs(ours.loglikelihood(requests("loglikelihood", *PAIRS))[0][0] - dense[0][0]) > 1e-2


def test_the_demos_answers_are_those_of_its_own_evaluation():
    folder = demo.MODEL_FOLDER
    plan = moa.load_plan(folder)
    ours = MoaLM("demo", plan=str(folder), batch_size=2)
    (recalled,) = recall_texts(ours.tokenizer, 300, RecallTask(families=("multikey",), texts_per_family=1))
    tokens = ours.tokenizer.convert_ids_to_tokens(recalled.token_ids)[1:]
    pairs = []
    for question in recalled.questions:
        first, last = question.positions[0] - 1, question.positions[-1]
        pairs.append((" ".join(tokens[:first]), " " + " ".join(tokens[first:last])))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with moa.apply(model, plan):
        expected = answer(model, recalled)
    found = ours.loglikelihood(requests("loglikelihood", *pairs))
    assert [greedy for _, greedy in found] == [a.right for a in expected]
    assert [-ll for ll, _ in found] == pytest.approx([a.nll for a in expected], abs=1e-3)


@pytest.mark.parametrize("length", [30, 300])
def test_cut_requests_are_counted(length, tiny_folder):
    ours = MoaLM(str(tiny_folder), max_length=length, batch_size=2)
    generate = [(text(20), {"max_gen_toks": 4}), (text(60), {"max_gen_toks": 4}), (text(61), {"max_gen_toks": 4})]
    ours.generate_until(requests("generate_until", *generate))
    pairs = [(text(22), " 42"), (text(70), " 42")]
    ours.loglikelihood(requests("loglikelihood", *pairs))
    assert [ours.was_cut(each) for each in (*generate, *pairs)] == [
        length == 30 and cut for cut in (False, True, True, False, True)
    ]
    assert ours.get_model_info()["moa"]["truncated_requests"] == (3 if length == 30 else 0)
    ours.forget_cuts()
    assert not any(map(ours.was_cut, (*generate, *pairs)))


@pytest.mark.parametrize(("words", "cut"), [(25, False), (26, True)])  # <bos>, words and 4 new tokens: 30 in all
def test_one_token_too_many_is_a_cut(words, cut, tiny_folder):
    ours = MoaLM(str(tiny_folder), max_length=30)
    request = (text(words), {"max_gen_toks": 4})
    ours.generate_until(requests("generate_until", request))
    assert ours.was_cut(request) is cut


def test_results_name_the_plan(tiny_folder, plan):
    ours = MoaLM(str(tiny_folder), plan=plan, max_length=512)
    info = ours.get_model_info()["moa"]
    assert (info["plan_sha256"], info["attention"], info["length_mode"]) == (plan.sha256, "torch", "running")
    assert info["model_fingerprint"] == plan.model.fingerprint
    assert str(tiny_folder.parent) not in str(info)
    with ours.model.moa:  # detached at the end
        pass
    info = ours.get_model_info()["moa"]
    assert (info["plan_sha256"], info["attention"]) == (None, "sdpa")


def test_a_plan_for_another_model_is_refused(tiny_folder):
    with pytest.raises(PlanError):
        MoaLM(str(tiny_folder), plan=str(demo.MODEL_FOLDER))


def test_a_loaded_model_and_tokenizer_will_do(tiny_folder, plan):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    ours = MoaLM(model, tokenizer=tokenizer, plan=plan)
    assert ours.plan == plan
    assert (ours.rank, ours.world_size) == (0, 1)


class Whole(NamedTuple):
    """A prompt of which all is kept."""

    cache: DynamicCache
    one_by_one: bool


@pytest.mark.parametrize("one_by_one", [False, True])
def test_from_prompts_kept_whole_it_says_what_stock_lm_eval_says(one_by_one, tiny_folder, stock):
    ours, seen = MoaLM(str(tiny_folder), batch_size=3), []

    def prefill(ids):
        cache = DynamicCache()
        with torch.no_grad():
            ours.model.model(input_ids=ids, past_key_values=cache)
        seen.append(ids.shape[1])
        return Whole(cache, one_by_one)

    ask = requests("loglikelihood", *PAIRS)
    written = [(context, {"max_gen_toks": 6, "until": ["mill"]}) for context, _ in PAIRS if context]
    written += [(text(60), {"max_gen_toks": 4, "until": ["."], "do_sample": False, "temperature": 1.0, "num_beams": 1})]
    with ours.compressing(prefill):
        found, answers = ours.loglikelihood(ask), ours.generate_until(requests("generate_until", *written))
    for (ll, greedy), (expected, wanted) in zip(found, stock.loglikelihood(ask), strict=True):
        assert ll == pytest.approx(expected, abs=1e-4)
        assert greedy == wanted
    assert answers == stock.generate_until(requests("generate_until", *written))
    sizes = [len(ours.tok_encode(context)) - 1 for context, _ in PAIRS if context]
    assert seen[:4] == sizes  # all of the prompt but its last token; that without a prompt is not prefilled
    assert sorted(seen[4:]) == sorted([*sizes, len(ours.tok_encode(text(60))) - 1])


def test_long_texts_lose_the_start_of_the_prompt_when_it_is_compressed(tiny_folder):
    stock = HFLM(str(tiny_folder), device="cpu", max_length=50)
    ours, seen = MoaLM(str(tiny_folder), max_length=50), []

    def prefill(ids):
        cache = DynamicCache()
        ours.model.model(input_ids=ids, past_key_values=cache)
        seen.append(ids.shape[1])
        return Whole(cache, False)

    ask = requests("loglikelihood", (text(90), " " + text(3, 1)))
    with ours.compressing(prefill), torch.no_grad():
        assert ours.loglikelihood(ask)[0][0] == pytest.approx(stock.loglikelihood(ask)[0][0], abs=1e-4)
        assert seen == [47]
        with pytest.raises(UsageError, match="leaves no room"):
            ours.loglikelihood(requests("loglikelihood", (text(9), " " + text(80))))


def test_what_a_compressed_prompt_cannot_answer_is_refused(tiny_folder):
    ours = MoaLM(str(tiny_folder))
    with ours.compressing(lambda ids: Whole(DynamicCache(), False)):
        with pytest.raises(UsageError, match="rolling"):
            ours.loglikelihood_rolling(requests("loglikelihood_rolling", (text(20),)))
        for asked in ({"do_sample": True}, {"num_beams": 2}):
            with pytest.raises(UsageError, match="greedily"):
                ours.generate_until(requests("generate_until", (text(20), {"max_gen_toks": 3, **asked})))
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", (text(20),)))  # and again afterwards
