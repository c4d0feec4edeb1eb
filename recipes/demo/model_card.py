"""Score the demo model and write its card: python recipes/demo/model_card.py MODEL

The card is `README.md` in the model's folder; its numbers are in `scores.json` beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moa.demo import language
from moa.eval.perplexity import perplexity
from moa.eval.recall import recall, recall_texts
from moa.eval.records import RecallTask
from moa.hf.load import load_model, load_tokenizer

LENGTHS = (512, 1024, 2048, 4096)
TASK = RecallTask(texts_per_family=6, single_texts=48, questions_per_text=16, seed=1)
NEAR_TOKENS = 64

CARD = """---
library_name: transformers
license: apache-2.0
language: en
---

# moa demo model

A Llama-architecture model with grouped-query attention ({layers} layers, {heads} query heads on {kv_heads} KV heads of
{head_dim}, {parameters:.2f} M parameters, context 4,096) for showing and testing attention compression on any machine.

**Data.** A small made-up language of {words} words, one token each: sentences whose words agree (short range), paragraphs
that return to their person and place (mid range), and facts such as `the code of {key} is {value} .` that are asked for at
the end of the text (long range). It knows nothing of the world and is good for nothing else.

**Training.** `recipes/demo/train.py`, seed {seed}, {steps} steps, {minutes:.0f} minutes on two CPU cores: a curriculum over
words (12 to 128 keys and values) and lengths (64 to 4,096 tokens), with random sequences that repeat in the early part.

**Recall.** Share of held-out questions whose whole answer is the model's first choice ({questions} questions per length and
family, at depths over the whole text), made by `recipes/demo/model_card.py`:

| family | {lengths} |
|---|{rule}|
{rows}

`single`: one fact in plain text. `multikey`: one fact about every 40 words, all but the asked ones distractors.
`multivalue`: two to four values of one key. `chain` (a fact that leads to another, two hops) {chain}.

Perplexity of plain text at 4,096 tokens: {perplexity:.2f}.

**Heads.** Share of each KV head's attention (mean of its query heads, text of 2,048 tokens, queries in the second half)
that goes further back than {near} tokens, the first 8 tokens apart:

| layer | {kv_columns} |
|---|{kv_rule}|
{far_rows}
"""


@torch.no_grad()
def far_attention(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Attention mass beyond `NEAR_TOKENS` and outside the first 8 tokens, per layer and KV head, [L, HKV]."""
    model.set_attn_implementation("eager")
    attentions = model(tokens, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    n, kv_heads = tokens.shape[1], model.config.num_key_value_heads
    positions = torch.arange(n)
    far = (positions[:, None] - positions >= NEAR_TOKENS) & (positions >= 8)  # [N, N]
    mass = torch.stack([(a[0] * far)[:, n // 2 :].sum(-1).mean(-1) for a in attentions])  # [L, HQ]
    return mass.view(len(attentions), kv_heads, -1).mean(-1)


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    folder = Path(parser.parse_args().model)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    training = json.loads((folder / "training.json").read_text())
    scores = recall(model, tokenizer, LENGTHS, TASK)
    families = {f: [next(s for s in at.families if s.family == f).score for at in scores] for f in language.FAMILIES}
    plain = perplexity(model, tokenizer, (LENGTHS[-1],))[0].perplexity
    text = recall_texts(tokenizer, 2048, TASK)[TASK.single_texts]
    far = far_attention(model, torch.tensor([text.token_ids]))
    config = model.config
    learnt = min(s.accuracy_ratio for s in families["chain"]) >= 0.98
    card = CARD.format(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        words=len(tokenizer),
        key=language.KEYS[0],
        value=language.VALUES[0],
        seed=training["seed"],
        steps=training["steps"],
        minutes=training["elapsed_s"] / 60,
        questions=f"{min(s.questions for f in families.values() for s in f)} or more",
        lengths=" | ".join(f"{n:,}" for n in LENGTHS),
        rule="---:|" * (len(LENGTHS) - 1) + "---:",
        rows=table([[f, *(f"{100 * s.accuracy_ratio:.1f} %" for s in row)] for f, row in families.items()]),
        chain="was learnt too"
        if learnt
        else "was in the training data but not learnt; no result of this project counts it",
        perplexity=plain,
        near=NEAR_TOKENS,
        kv_columns=" | ".join(f"KV {i}" for i in range(config.num_key_value_heads)),
        kv_rule="---:|" * (config.num_key_value_heads - 1) + "---:",
        far_rows=table([[str(i), *(f"{100 * x:.0f} %" for x in row)] for i, row in enumerate(far.tolist())]),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    content = {"recall": [at.model_dump(mode="json") for at in scores], "plain_perplexity_4096": plain}
    (folder / "scores.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
