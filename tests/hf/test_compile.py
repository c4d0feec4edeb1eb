"""torch.compile of a model under a plan says what the model says uncompiled; attention stays outside of the graphs."""

from __future__ import annotations

import pytest
import torch

from moa.hf import apply


# a graph per shape is what generate() makes of any cache that grows
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_compiled_model_says_the_same(model, plan, prompts, make, backend) -> None:
    torch._dynamo.reset()
    short = {**make.greedy, "max_new_tokens": 4}
    with apply(model, plan), torch.no_grad():
        want, tokens = model(prompts).logits, model.generate(prompts, **short)
        compiled = torch.compile(model, backend=backend)
        torch.testing.assert_close(compiled(prompts).logits, want, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(compiled(prompts[:, :120]).logits, want[:, :120], atol=1e-3, rtol=1e-4)
        model.compile(backend=backend)
        assert torch.equal(model.generate(prompts, **short), tokens)
    torch._dynamo.reset()
