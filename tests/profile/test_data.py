"""Calibration texts: lengths, answers where they should be, and refusals that name file, line and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moa.demo import language
from moa.demo.tokenizer import build_tokenizer
from moa.errors import DataError
from moa.profile import data, dataset, supervise, synthetic, texts


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2's, trained on a text that is not the demo's; no `<bos>`."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["The code of a town is 42 . There and back again ."] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["words", "bytes"])
def tokenizer(request) -> PreTrainedTokenizerBase:
    return build_tokenizer() if request.param == "words" else byte_level_bpe()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def answers(tokenizer: PreTrainedTokenizerBase, sample: data.TextSample) -> list[str]:
    """The answers' numbers as text."""
    return tokenizer.decode(list(sample.answer_ids)).split()


@pytest.mark.parametrize("n_tokens", [300, 512, 1001])
def test_synthetic_texts_have_their_length_and_answers(tokenizer, n_tokens) -> None:
    samples = synthetic.synthetic_samples(tokenizer, n_tokens, 8, seed=3)
    assert len(samples) == 8
    for sample in samples:
        if tokenizer.bos_token:
            assert len(sample.token_ids) == n_tokens
        assert 0.6 * n_tokens < len(sample.token_ids) <= n_tokens
        assert min(sample.answer_positions) >= 1
        assert sample.answer_ids == tuple(sample.token_ids[p] for p in sample.answer_positions)
        text = tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
        asked = [part.split(".")[0].split() for part in text.split("question :")[1:]]
        wanted = [value for words in asked for value in words if value in language.VALUES]
        assert wanted
        assert "".join(answers(tokenizer, sample)) == "".join(wanted)  # bytes: answers of neighbours may join


def test_all_families_take_turns_and_evidence_is_spread(words) -> None:
    texts = [words.decode(s.token_ids) for s in synthetic.synthetic_samples(words, 512, 3, seed=0)]
    assert "codes" not in texts[0]
    assert "codes" in texts[2]
    for text in texts[1:]:
        body = text.split("question :")[0].split()
        facts = [i for i, word in enumerate(body) if word in ("code", "codes")]
        assert min(facts) < len(body) / 4
        assert max(facts) > 3 * len(body) / 4


def test_seeds_decide_everything(words) -> None:
    first = synthetic.synthetic_samples(words, 256, 4, seed=1)
    assert first == synthetic.synthetic_samples(words, 256, 4, seed=1)
    assert first != synthetic.synthetic_samples(words, 256, 4, seed=2)
    assert data.digest(first) == data.digest(synthetic.synthetic_samples(words, 256, 4, seed=1))
    assert data.digest(first) != data.digest(first[:3])
    assert synthetic.synthetic_samples(words, 256, 2, seed=1) == first[:2]


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_too_short_for_a_text(tokenizer, n_tokens) -> None:
    with pytest.raises(DataError, match="longer --lengths"):
        synthetic.synthetic_samples(tokenizer, n_tokens, 4, seed=0)


ROW = '{"prompt": "the dog", "answer": "10"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no samples; wanted lines like"),
        ("\n \n", "no samples"),
        (ROW + "\n{bad", "line 2: not JSON"),
        ("[1]", "line 1: wanted a JSON object, got list"),
        ("null", "line 1: wanted a JSON object, got NoneType"),
        ('{"promt": "x"}', "line 1: unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": "x", "weight": 1}', "unknown key 'weight'; known are prompt, answer"),
        ('{"answer": "x"}', "the key 'prompt' is missing"),
        ("{}", "the key 'prompt' is missing"),
        ('{"prompt": 3}', "'prompt' must be a text that is not empty, got 3"),
        ('{"prompt": ""}', "'prompt' must be a text"),
        ('{"prompt": "x", "answer": null}', "'answer' must be a text that is not empty, got None"),
        ('{"prompt": "x", "answer": ["y"]}', "'answer' must be a text"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 1: not JSON"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text, message) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=r"rows\.jsonl") as caught:
        dataset.read_rows(file)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        dataset.read_rows(tmp_path / "none")
    with pytest.raises(DataError, match="cannot be read"):
        dataset.read_rows(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="UTF-8"):
        dataset.read_rows(tmp_path / "latin")


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=1, max_size=5), st.booleans())
def test_every_text_comes_back(tmp_path_factory, texts, escaped) -> None:
    """Also with the line ends that only Python knows, byte order marks and carriage returns."""
    file = tmp_path_factory.mktemp("rows") / "rows"
    rows = [{"prompt": text, "answer": text} for text in texts]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    file.write_bytes(b"\xef\xbb\xbf" * escaped + lines.encode())
    assert dataset.read_rows(file) == rows


def row(prompt: int, answer: int | None = 2) -> dict[str, str]:
    """Words in the prompt and in the answer."""
    made = {"prompt": " ".join(language.KEYS[i % 128] for i in range(prompt))}
    return made if answer is None else {**made, "answer": " ".join(["10"] * answer)}


def take(tokenizer, rows, n_tokens=64, count=10, seed=0):
    return texts.file_samples(rows, tokenizer, n_tokens, count, seed, "file")


def test_a_long_prompt_loses_its_left(words) -> None:
    (sample,) = take(words, [row(100)])
    whole = words(row(100)["prompt"])["input_ids"]
    assert sample.token_ids == (whole[0], *whole[-61:], *[words.get_vocab()["10"]] * 2)  # <bos> stays
    assert sample.truncated_tokens == 101 - 62
    assert sample.answer_positions == (62, 63)
    (short,) = take(words, [row(40)])
    assert (len(short.token_ids), short.truncated_tokens) == (43, 0)


@given(prompt=st.integers(1, 200), answer=st.none() | st.integers(1, 100), n_tokens=st.sampled_from([64, 65, 128]))
@settings(max_examples=60)
def test_a_sample_never_exceeds_its_length(words, prompt, answer, n_tokens) -> None:
    try:
        (sample,) = take(words, [row(prompt, answer)], n_tokens)
    except DataError:
        assert prompt + 1 + (32 if answer is None else answer) <= n_tokens // 2 or (answer or 0) >= n_tokens
        return
    written = supervise.GENERATED_ANSWER_TOKENS if answer is None else 0
    assert n_tokens // 2 < len(sample.token_ids) + written <= n_tokens
    assert all(p >= 1 for p in sample.answer_positions)
    assert len(sample.token_ids) + sample.truncated_tokens == prompt + 1 + (answer or 0)


def test_short_texts_are_left_out(words) -> None:
    rows = [row(5), row(60), row(10), row(61)]
    assert len(take(words, rows)) == 2
    assert len(take(words, rows, count=1)) == 1
    with pytest.raises(DataError, match=r"file: no sample is longer than 32 tokens"):
        take(words, [row(5)])
    with pytest.raises(DataError, match="leaves room for its prompt"):
        take(words, [row(5, 64)])


def test_which_rows_are_taken_depends_on_the_seed_alone(words) -> None:
    rows = [row(40 + i) for i in range(20)]
    assert take(words, rows, count=5) == take(words, rows, count=5)
    assert take(words, rows, count=5) != take(words, rows, count=5, seed=1)
    assert len({s.token_ids for s in take(words, rows, count=20)}) == 20


def test_answers_of_the_model_are_its_first_choices(make, words) -> None:
    model = make.model(vocab_size=len(words))
    given_, open_ = take(words, [row(50)])[0], take(words, [row(60, None)], 128)[0]
    supervised, written = supervise.supervise(model, [given_, open_])
    assert supervised.token_ids == given_.token_ids
    assert supervised.answer_positions == given_.answer_positions
    with torch.no_grad():
        for sample in (supervised, written):
            logits = model(torch.tensor([sample.token_ids])).logits[0]
            choices = logits[torch.tensor(sample.answer_positions) - 1].argmax(-1).tolist()
            assert list(sample.answer_ids) == choices
    assert supervised.answer_ids != given_.answer_ids
    assert written.token_ids[: len(open_.token_ids)] == open_.token_ids
    assert tuple(written.token_ids[p] for p in written.answer_positions) == written.answer_ids
    assert len(written.token_ids) <= 128


def test_references_are_required_where_they_count(words) -> None:
    samples = take(words, [row(50), row(60, None)])
    with pytest.raises(DataError, match="file: 1 of 2 samples have no 'answer'"):
        data.require_answers(samples, "file")
    kept = take(words, [row(50)])
    assert data.require_answers(kept, "file") == kept
