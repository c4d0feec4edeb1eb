"""Train the demo model from a seed on the demo's language: python recipes/demo/train.py -o OUT

About an hour on two CPU cores. A copy curriculum (half of each early batch is a random sequence that repeats) makes
recall appear within a few hundred steps; the length then grows to 4,096 tokens stage by stage.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moa.demo import language
from moa.demo.tokenizer import build_tokenizer

CONTEXT_TOKENS = 4096
# The four groups of predictable words, each with a mean loss of its own, so that none drowns the others.
PLAIN, ANSWER, COPY, CHAIN = range(4)
GROUP_NAMES = ("plain", "answer", "copy", "chain")
GROUP_WEIGHTS = (1.0, 1.0, 1.0, 0.5)


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum; it ends early once the running losses of answers and copies fall below `enough`.

    A stage with `mixed` lengths takes one of them at random for each batch, so that the short ones are not forgotten. `rate` is the share of the peak learning rate at its start and end. Both optimizers start fresh where it is below 1.
    """

    n_tokens: int
    batch: int
    max_steps: int
    copy_share: float
    enough: float
    lexicon: int = language.N_KEYS
    rate: tuple[float, float] = field(default=(1.0, 1.0), repr=False)
    mixed: tuple[int, ...] = field(default=(), repr=False)


# Few words first: with all of them from the start, recall takes many times as many steps to appear.
STAGES = (
    Stage(64, 32, 1500, 0.5, 0.3, lexicon=12),
    Stage(64, 32, 800, 0.5, 0.3, lexicon=24),
    Stage(64, 32, 800, 0.5, 0.3, lexicon=48),
    Stage(64, 32, 1000, 0.5, 0.3),
    Stage(128, 16, 1500, 0.5, 0.15),
    Stage(256, 8, 1000, 0.5, 0.1),
    Stage(512, 4, 800, 0.25, 0.05),
    Stage(1024, 4, 300, 0.0, 0.0, rate=(0.5, 0.35)),
    Stage(2048, 2, 200, 0.0, 0.0, rate=(0.35, 0.2)),
    Stage(4096, 1, 150, 0.0, 0.0, rate=(0.2, 0.0)),
    Stage(4096, 1, 230, 0.0, 0.0, rate=(0.35, 0.0)),
    Stage(4096, 1, 360, 0.25, 0.0, rate=(0.25, 0.0), mixed=(512, 1024, 2048, 4096)),
    Stage(4096, 1, 210, 0.25, 0.0, rate=(0.25, 0.0), mixed=(512, 2048, 4096, 4096, 4096)),
)


def model_config(vocab_size: int, layers: int, width: int) -> LlamaConfig:
    """Llama with 8 query heads on 4 KV heads; a large rope_theta leaves half of each head nearly position-free."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=language.SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=language.SPECIAL_TOKENS.index("<eos>"),
        pad_token_id=language.SPECIAL_TOKENS.index("<pad>"),
    )


def recall_row(rng: random.Random, ids: dict[str, int], n_tokens: int, lexicon: int) -> tuple[list[int], list[int]]:
    """Token ids and group of each word of one text with facts and questions; -1 marks words nobody could predict."""
    family = rng.choices(language.FAMILIES, weights=(2, 4, 3, 1))[0]
    words_per_fact = rng.choice((24, 32, 48))
    n_questions = 1 if family == "single" else min(48, n_tokens // words_per_fact)
    return labelled(language.recall_sample(rng, n_tokens, family, n_questions, words_per_fact, lexicon), ids)


def mixed_row(rng: random.Random, ids: dict[str, int], n_tokens: int) -> tuple[list[int], list[int]]:
    """The same for the last stage: one-hop questions alone, mostly about several values, as evaluation asks them."""
    family = rng.choices(language.ONE_HOP, weights=(1, 3, 5))[0]
    n_questions = 1 if family == "single" else min(24, n_tokens // 32)
    return labelled(language.recall_sample(rng, n_tokens, family, n_questions, rng.choice((None, 48))), ids)


def labelled(sample: language.Sample, ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Token ids and groups of a text."""
    groups = [PLAIN] * len(sample.words)
    for i, word in enumerate(sample.words):
        if word in ids and word in _UNPREDICTABLE:
            groups[i] = -1
    for question in sample.questions:
        group = CHAIN if question.family == "chain" else ANSWER
        groups[question.start : question.stop + 1] = [group] * (question.stop + 1 - question.start)
    return [ids[word] for word in sample.words], groups


_UNPREDICTABLE = frozenset((*language.KEYS, *language.VALUES))


def copy_row(rng: random.Random, pool: list[int], n_tokens: int) -> tuple[list[int], list[int]]:
    """A random sequence that repeats: everything after its first round is predictable by looking back."""
    period = round(math.exp(rng.uniform(math.log(4), math.log(n_tokens // 2))))
    segment = [rng.choice(pool) for _ in range(period)]
    row = [1, *(segment * math.ceil(n_tokens / period))][:n_tokens]
    return row, [-1 if i <= period + 1 else COPY for i in range(n_tokens)]


def batches(seed: int, ids: dict[str, int], stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: token ids [B, N] and groups [B, N]."""
    rng = random.Random(f"{seed}-{stage}")
    n_copies = round(stage.batch * stage.copy_share)
    pool = [ids[word] for word in (*language.KEYS[: stage.lexicon], *language.VALUES[: stage.lexicon])]
    while stage.mixed:
        n = rng.choice(stage.mixed)
        batch = stage.n_tokens // n
        copies = round(batch * stage.copy_share)
        rows = [copy_row(rng, pool, n) for _ in range(copies)] + [mixed_row(rng, ids, n) for _ in range(batch - copies)]
        yield torch.tensor([row for row, _ in rows]), torch.tensor([group for _, group in rows])
    while True:
        rows = [copy_row(rng, pool, stage.n_tokens) for _ in range(n_copies)]
        rows += [recall_row(rng, ids, stage.n_tokens, stage.lexicon) for _ in range(stage.batch - n_copies)]
        yield torch.tensor([row for row, _ in rows]), torch.tensor([group for _, group in rows])


def group_losses(logits: Tensor, tokens: Tensor, groups: Tensor) -> dict[int, Tensor]:
    """Mean cross-entropy of each group that occurs; logits [B, N, V], tokens and groups [B, N]."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    target_groups = groups[:, 1:].flatten()
    return {g: losses[target_groups == g].mean() for g in range(len(GROUP_NAMES)) if (target_groups == g).any()}


def make_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (recall appears about twice as early as with AdamW alone), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=0.25 * learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def learning_rate_scale(stage: Stage, step: int) -> float:
    """Linear over a stage, after a warm-up of 50 steps wherever the optimizers are fresh."""
    first, last = stage.rate
    warm = min(1.0, (step + 1) / 50) if stage == STAGES[0] or first < 1 else 1.0
    return warm * (first + (last - first) * step / stage.max_steps)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group["peak_lr"]


@torch.no_grad()
def recall_accuracy(model: LlamaForCausalLM, ids: dict[str, int], n_tokens: int, family: language.Family) -> float:
    """Share of held-out questions whose every answer token is the model's first choice."""
    rng = random.Random(f"held-out-{n_tokens}-{family}")
    right = total = 0
    for _ in range(4 if family != "single" else 8):
        sample = language.recall_sample(rng, n_tokens, family, 1 if family == "single" else min(8, n_tokens // 64))
        tokens = torch.tensor([[ids[word] for word in sample.words]])
        choices = model(tokens, use_cache=False).logits.argmax(-1)  # [1, N]
        for q in sample.questions:
            right += bool((choices[0, q.start - 1 : q.stop - 1] == tokens[0, q.start : q.stop]).all())
            total += 1
    return right / total


def train(args: argparse.Namespace) -> None:
    """All stages; writes the model, the tokenizer and the training log into `args.output_dir`."""
    torch.manual_seed(args.seed)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer: PreTrainedTokenizerFast = build_tokenizer()
    ids = dict(tokenizer.get_vocab())
    model = LlamaForCausalLM.from_pretrained(out) if args.first_stage else new_model(len(ids), args)
    log = Log(out / "training.csv", going_on=args.first_stage > 0)
    optimizers = make_optimizers(model, args.learning_rate)
    for stage in STAGES[args.first_stage :]:
        if stage.n_tokens > args.max_tokens:
            break
        if stage.rate[0] < 1:
            optimizers = make_optimizers(model, args.learning_rate)
        train_stage(model, optimizers, stage, batches(args.seed, ids, stage), log)
        scores = {f: recall_accuracy(model, ids, stage.n_tokens, f) for f in language.FAMILIES}
        print(f"after {log.steps} steps, {stage.n_tokens} tokens, {stage.lexicon} words: {scores}", flush=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    record = {"seed": args.seed, "steps": log.steps, "elapsed_s": round(log.elapsed_s), "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def new_model(vocab_size: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """A random model whose words share a direction.

    It stands in for the biases Llama lacks: without it a head cannot learn to look at a place whatever the words are,
    such as the word before.
    """
    model = LlamaForCausalLM(model_config(vocab_size, args.layers, args.width))
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(0.1 * torch.randn_like(embeddings) + 0.1 * torch.randn(args.width))
    return model


def train_stage(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    stage: Stage,
    data: Iterator[tuple[Tensor, Tensor]],
    log: Log,
) -> None:
    running = {PLAIN: 6.0, ANSWER: 3.0, COPY: 3.0 if stage.copy_share else 0.0, CHAIN: 6.0}
    for step, (tokens, groups) in zip(range(stage.max_steps), data, strict=False):
        set_learning_rate(optimizers, learning_rate_scale(stage, step))
        losses = group_losses(model(tokens, use_cache=False).logits, tokens, groups)
        torch.stack([GROUP_WEIGHTS[g] * loss for g, loss in losses.items()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running |= {g: 0.96 * running[g] + 0.04 * loss.item() for g, loss in losses.items()}
        log.step(stage, running)
        if max(running[ANSWER], running[COPY]) < stage.enough:
            break


class Log:
    """`training.csv`: a row of running losses every 50 steps."""

    def __init__(self, path: Path, going_on: bool) -> None:
        rows = list(csv.DictReader(path.open())) if going_on else []
        self.steps = int(rows[-1]["step"]) if rows else 0
        self._before_s = float(rows[-1]["elapsed_s"]) if rows else 0.0
        self._started = time.monotonic()
        self._file = path.open("a" if going_on else "w", newline="")
        self._rows = csv.writer(self._file)
        if not going_on:
            self._rows.writerow(["step", "n_tokens", *(f"loss_{name}" for name in GROUP_NAMES), "elapsed_s"])

    @property
    def elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._started

    def step(self, stage: Stage, running: dict[int, float]) -> None:
        self.steps += 1
        if self.steps % 50 == 0:
            losses = [f"{running[g]:.4f}" for g in range(len(GROUP_NAMES))]
            self._rows.writerow([self.steps, stage.n_tokens, *losses, f"{self.elapsed_s:.0f}"])
            self._file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-stage", type=int, default=0, help="go on with this stage from the model in OUT")
    parser.add_argument(
        "--max-tokens", type=int, default=CONTEXT_TOKENS, help="end before the stages with longer texts"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
