"""A trial run: do texts side by side in one row say what each says alone? Milliseconds, before a model serves anybody."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moa.devices import input_device
from moa.errors import ModelError
from moa.hf.shape import model_sizes
from moa.kernels.batch import Batch
from moa.kernels.dispatch import new_memory
from moa.runner.packed import PackedModel, check_free, dense_rules

TRIAL_TOKENS = 40
# Of the logits' spread, for one token. Half precision stays near 0.05; a wrong neighbour, position or mask gives about 1.
LARGEST_DIFFERENCE = 0.5
# Rows of (text, first token, end): chunks beside a token of another text, and texts in changing order.
ROWS = (((0, 0, 20),), ((0, 20, 21), (1, 0, 25)), ((1, 25, 40), (0, 21, 40)))


def check_packs(model: PreTrainedModel) -> None:
    """Make sure that a model can run packed.

    Raises:
        ModelError: it cannot; says why, or by how much its logits differ.
    """
    check_free(model)
    known = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # [V, W]; typed as any module
    texts = torch.randint(known, (2, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = model(texts.to(input_device(model)), use_cache=False).logits.float()  # [2, T, V]
    try:
        got = _packed_logits(model, texts, torch.empty_like(want))
    except ValueError as error:  # what `attend` refuses, such as another number of heads than the config says
        raise ModelError(f"{type(model).__name__} cannot run packed: {error}") from None
    # [2, T] -> the worst token: a look at the wrong neighbour shows where a chunk ends, and there alone
    difference = float((got - want).abs().mean(-1).max() / want.std())
    if difference > LARGEST_DIFFERENCE:  # not a number is damaged weights: that ends each request with an error
        raise ModelError(
            f"{type(model).__name__} cannot run packed: texts side by side in one row differ from each alone by "
            f"{difference:.2f} of their logits' spread; some part of it looks at more than one token, or counts positions of its own"
        )


def _packed_logits(model: PreTrainedModel, texts: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Logits [2, T, V] of both texts, run as `ROWS` says."""
    shape = model_sizes(model, "float32")
    rules = dense_rules(shape.layers, shape.kv_heads)
    with PackedModel(model) as packed, new_memory("torch", rules, packed.windows) as memory:
        for text in range(2):
            memory.add(text)
        for row in ROWS:
            tokens = [token for text, first, end in row for token in texts[text, first:end].tolist()]
            positions = [position for _, first, end in row for position in range(first, end)]
            batch = Batch.pack([(text, end - first, first) for text, first, end in row])
            logits = packed.forward(tokens, positions, batch, memory, range(len(tokens)))
            for text, offset, count, first in batch.slices:
                into[text, first : first + count] = logits[offset : offset + count]
    return into
